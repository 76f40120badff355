"""Laws of a chat: what is read is the template of its turns, and each answers as it does alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trained import save_trained

from qlora_kit.commands.argv import parse
from qlora_kit.commands.chat import GROUPS
from qlora_kit.errors import AdapterError, ConfigError, DataError, QloraKitError
from qlora_kit.generation.decode import generate_ids
from qlora_kit.generation.text import added_text
from qlora_kit.process.signals import Stopped
from qlora_kit.run.chat import open_chat
from qlora_kit.run.chat_events import Began, Ended, Event, Left, Note, Piece
from qlora_kit.run.chat_lines import Lines
from qlora_kit.run.conversation import Conversation, Turn

TOKENS = 12


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """A chat with `tiny` and two adapters on it, of different ranks and effects."""
    root = tmp_path_factory.mktemp("adapters")
    for name, spread in (("a", 0.06), ("b", 0.12)):
        save_trained(Path("tiny"), root / name, spread=spread)
    named = [f"--adapter={name}={root / name}" for name in "ab"]
    flags = [*named, "--max_new_tokens", str(TOKENS), "--dtype", "fp32", "--allow_other_base"]
    return open_chat(parse("qlora-kit chat", "", GROUPS, flags))


@pytest.fixture
def lines(opened: Lines) -> Lines:
    """One that nothing was said in."""
    return Lines(Conversation(opened.conversation.by, "a"))


def answers(events: Iterator[Event]) -> dict[str, str]:
    """Who answered, and what."""
    names: tuple[str, ...] = ()
    texts: list[str] = []
    for event in events:
        if isinstance(event, Began):
            names, texts = event.names, [""] * len(event.names)
        elif isinstance(event, Piece):
            texts[event.place] += event.text
    return dict(zip(names, texts, strict=True))


def notes(events: Iterator[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def alone(lines: Lines, adapter: str | None, ids: list[int], tokens: int = TOKENS) -> str:
    """The greedy answer of one adapter in use, or of the base, to a prompt by itself."""
    by = lines.conversation.by
    written, bank = by.formats[adapter], by.bank
    with bank.using(adapter):
        steps = generate_ids(
            bank.base.model, [ids], max_new_tokens=tokens, eos_ids=written.ends, pad_id=0
        )
        found = [token for step in steps for token in step if token is not None]
    return added_text(written.tokenizer, found, ids)


def templated(
    lines: Lines, turns: list[Turn], message: str, system: str | None = None
) -> list[int]:
    """The ids that transformers makes of a history."""
    messages = [{"role": "system", "content": system}] if system else []
    for said, answer in turns:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": message})
    tokenizer = lines.conversation.by.bank.base.tokenizer
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(made)


def test_turns_are_read_as_the_template_writes_them_whoever_answers(lines: Lines) -> None:
    talk = lines.conversation
    expected: list[Turn] = []
    for line, adapter, system in (
        ("Hello", "a", None),
        ("/system Be brief.", None, None),
        ("Who are you?", "a", "Be brief."),
        ("/use b", None, None),
        ("  And you?  ", "b", "Be brief."),
        ("/base", None, None),
        ("//slash \u00e9\u4e2d\U0001f600", None, "Be brief."),
        ("/system", None, None),
        ("two\nlines", None, None),
    ):
        if line.startswith("/") and not line.startswith("//"):
            assert answers(lines.hear(line)) == {}
            continue
        message = line.strip().removeprefix("/")
        ids = templated(lines, expected, message, system)
        assert talk.ids(message, adapter) == ids
        (answer,) = answers(lines.hear(line)).values()
        assert answer == alone(lines, adapter, ids)
        expected.append(Turn(message, answer))
        assert talk.turns == expected
    assert len({turn.answer for turn in expected}) > 2
    list(lines.hear("/reset"))
    assert talk.turns == []
    assert talk.ids("Hello", "a") == templated(lines, [], "Hello")


def test_compared_answers_are_those_of_each_alone_and_the_turn_has_that_in_use(
    lines: Lines,
) -> None:
    talk = lines.conversation
    list(lines.hear("Hello"))
    first = list(talk.turns)
    ids = templated(lines, first, "And now?")
    wanted = {"base": alone(lines, None, ids), "a": alone(lines, "a", ids)}
    assert wanted["base"] != wanted["a"]
    assert answers(lines.hear("/compare And now?")) == wanted
    assert talk.turns == [*first, Turn("And now?", wanted["a"])]
    # The last message again, with the base in use: against the adapter that was used last.
    list(lines.hear("/base"))
    assert answers(lines.hear("/compare")) == wanted
    assert talk.turns == [*first, Turn("And now?", wanted["base"])]
    with pytest.raises(ConfigError, match=r"no message to compare .* give /compare TEXT"):
        list(Lines(Conversation(talk.by, "a")).hear("/compare"))


@pytest.mark.parametrize("line", ["Tell me all.", "/compare Tell me all.", "/compare"])
@pytest.mark.parametrize(
    "stop",
    [lambda events: events.close(), lambda events: events.throw(Stopped(signal.SIGINT))],
    ids=["closed", "interrupted"],
)
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    lines: Lines, line: str, stop: Callable[[Iterator[Event]], None]
) -> None:
    talk = lines.conversation
    list(lines.hear("Hello"))
    before = list(talk.turns)
    for pieces in (0, 2):
        talk.turns = list(before)
        events, came = lines.hear(line), ""
        while not isinstance(next(events), Began):
            pass
        while came.count("|") < pieces:
            event = next(events)
            if isinstance(event, Piece) and (event.place == 1 or "/" not in line):
                came += event.text + "|"
        with contextlib.suppress(Stopped):
            stop(events)
        message = "Hello" if line == "/compare" else "Tell me all."
        kept = before[:-1] if line == "/compare" and pieces else before
        assert talk.turns == kept + [Turn(message, came.replace("|", ""))] * bool(pieces)
        assert talk.by.engine.idle


@pytest.mark.parametrize(("asked", "most"), [(100, 924), (1000, 512)])
def test_the_oldest_turns_are_left_out_where_the_context_ends_and_it_is_said_once(
    opened: Lines, asked: int, most: int
) -> None:
    by = opened.conversation.by
    tight = Conversation(by.__class__(**{**vars(by), "max_new_tokens": asked}), "a", "Be brief.")
    lines = Lines(tight)
    tight.turns = [Turn(f"question {n} " * 36, f"answer {n}") for n in range(14)]
    turns = list(tight.turns)
    fitting = next(
        n for n in range(15) if len(templated(lines, turns[n:], "more", "Be brief.")) <= most
    )
    assert 0 < fitting < 13
    events = lines.hear("more")
    assert notes(iter([next(events)])) == [
        "the conversation and an answer no longer fit the model's context of 1024 tokens: the "
        "oldest turns are left out from here on"
    ]
    assert tight.ids("more", "a") == templated(lines, turns[fitting:], "more", "Be brief.")
    next(events)
    events.close()
    events = lines.hear("more and more and more")
    assert isinstance(next(events), Began)
    events.close()
    with pytest.raises(ConfigError, match=r"the message has \d+ tokens, and the model's context"):
        list(lines.hear("far too long " * 1000))
    assert tight.turns == turns


def test_a_plain_chat_reads_each_message_alone_with_a_line_end(opened: Lines) -> None:
    by = opened.conversation.by
    lines = Lines(Conversation(by.__class__(**{**vars(by), "plain": True}), "b"))
    tokenizer = by.bank.base.tokenizer
    list(lines.hear("The box is here."))
    ids = tokenizer("The fox is there.\n").input_ids
    assert lines.conversation.ids("The fox is there.", "b") == ids
    assert answers(lines.hear("The fox is there.")) == {"b": alone(lines, "b", ids)}
    with pytest.raises(ConfigError, match="plain chat has no place for a system"):
        list(lines.hear("/system Be brief."))


def test_an_answer_ends_at_a_stop_and_says_where_it_is_cut(opened: Lines) -> None:
    by = opened.conversation.by
    whole = answers(Lines(Conversation(by, "b")).hear("Hello"))["b"]
    middle = whole[len(whole) // 2 :][:2]
    stopping = Conversation(by.__class__(**{**vars(by), "stops": (middle,)}), "b")
    events = list(Lines(stopping).hear("Hello"))
    assert answers(iter(events))["b"] == whole[: whole.index(middle)]
    assert events[-1] == Ended(0, None)
    cut = by.__class__(**{**vars(by), "max_new_tokens": 2})
    events = list(Lines(Conversation(cut, "b")).hear("Hello"))
    assert events[-1] == Ended(0, "cut after 2 tokens")


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("/usee b", ConfigError, "unknown command /usee, did you mean /use?"),
        ("/xyzzy", ConfigError, "/help lists them, and //text"),
        ("/use c", AdapterError, "no adapter is called 'c'; name one of a, b, base"),
        *(
            (f"/{name} all", ConfigError, f"/{name} takes nothing, and 'all' follows it")
            for name in ("base", "reset", "adapters", "help", "quit")
        ),
        ("a\udcff", DataError, "not UTF-8"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    lines: Lines, line: str, kind: type[QloraKitError], words: str
) -> None:
    talk = lines.conversation
    talk.turns = [Turn("Hello", "Hi")]
    with pytest.raises(kind, match=words.replace("?", r"\?")):
        list(lines.hear(line))
    assert (talk.turns, talk.adapter, talk.system) == ([Turn("Hello", "Hi")], "a", None)


def test_what_the_system_says_is_refused_where_the_template_leaves_it_out(lines: Lines) -> None:
    tokenizer = lines.conversation.by.formats["a"].tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    try:
        with pytest.raises(ConfigError, match="the chat template leaves out what the system says"):
            list(lines.hear("/system Be brief."))
    finally:
        tokenizer.chat_template = before
    assert lines.conversation.system is None


def test_nobody_is_compared_whose_template_leaves_out_what_the_system_says(lines: Lines) -> None:
    talk = lines.conversation
    talk.turns, talk.system = [Turn("Hello", "Hi")], "Be brief."
    tokenizer = talk.by.formats[None].tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}" + (
        "{{ m['content'] + '\\n' }}{% endfor %}"
    )
    try:
        for line in ("/compare", "/compare And now?", "/base"):
            with pytest.raises(QloraKitError, match="the chat template leaves out"):
                list(lines.hear(line))
    finally:
        tokenizer.chat_template = before
    assert (talk.turns, talk.adapter) == ([Turn("Hello", "Hi")], "a")


def test_commands_are_listed_completed_and_leave(lines: Lines) -> None:
    assert lines.completions("/u") == ["/use", "/use a", "/use b", "/use base"]
    said = "\n".join(notes(lines.hear("/help")))
    assert all(one.partition(" ")[0] in said for one in lines.completions("/"))
    assert [note.split()[0] for note in notes(lines.hear("/adapters"))] == ["a", "b"]
    assert list(lines.hear("/quit")) == [Left()]
    assert list(lines.hear("   ")) == []
