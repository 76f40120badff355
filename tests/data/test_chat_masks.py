"""The mask of chats against hand labels, a masker written apart, upstream, and mutations of it."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from chat_tokenizer import CONTROL, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_chats import CHATS, labelled, messages_of
from masker import TEMPLATES, labels_of, pieces

from qlora_kit.data import chat_mask, tokens
from qlora_kit.data import encode as rows_to_tokens
from qlora_kit.data.chat_template import template_names, use_template
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.labels import TOO_LONG, TOO_LONG_ANSWER
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Encoded, Skipped

PADS = {"pad": "<|im_end|>", "pad is eos": "</s>", "no pad": None}
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}


def tokenizer_of(name, pad=None, adds_bos=True):
    tokenizer = chat_tokenizer(pad, adds_bos)
    use_template(tokenizer, name)
    return tokenizer


TOKENIZERS = {name: tokenizer_of(name) for name in TEMPLATES}


def row(messages):
    return Row({"messages": messages}, "chats.jsonl", 1)


def encode(messages, tokenizer, max_length=10_000, module=rows_to_tokens):
    result = module.encode(row(messages), tokenizer, max_length)
    if isinstance(result, Skipped) or type(result).__name__ == "Skipped":
        return result
    (one,) = result
    return one


# --- the masker itself, and the thirty chats ------------------------------------------------------


def test_every_template_has_a_masker_and_six_labelled_chats():
    assert sorted(TEMPLATES) == template_names()
    assert len(CHATS) == 30
    assert all(sum(name == chat[0] for chat in CHATS) == 6 for name in TEMPLATES)


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_the_masker_is_right_on_what_was_labelled_by_hand(number):
    name, turns, text = CHATS[number]
    plain, trained = labelled(text)
    written = pieces(name, messages_of(turns))
    assert "".join(part for part, _ in written) == plain
    assert [learn for part, learn in written for _ in part] == trained


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("number", range(len(CHATS)))
def test_we_are_right_on_what_was_labelled_by_hand(number, pad):
    # Also where the end token is what rows are padded with.
    name, turns, text = CHATS[number]
    tokenizer = tokenizer_of(name, PADS[pad])
    plain, trained = labelled(text)
    result = encode(messages_of(turns), tokenizer)
    reference = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
    assert result.input_ids == reference["input_ids"]
    expected = [
        token if trained[first] else -100
        for token, (first, _) in zip(result.input_ids, reference["offset_mapping"], strict=True)
    ]
    assert result.labels == expected
    end = tokenizer.convert_tokens_to_ids(ENDS.get(name, "</s>"))
    answers = [turn for turn in turns if turn[0] == "assistant" and turn[2:] != (0,)]
    assert result.labels.count(end) == len(answers)


# --- random chats -------------------------------------------------------------------------------

contents = st.one_of(
    st.text(st.sampled_from("heo lu\n:#é🙂\u200d🏳<|>[]/IST"), max_size=12),
    st.lists(
        st.sampled_from([*CONTROL, "he", " ", "\n", "🙂", "[/INST]", "\ue002"]), max_size=4
    ).map("".join),
)


@st.composite
def chats(draw):
    """A template's name and messages that it takes."""
    name = draw(st.sampled_from(sorted(TEMPLATES)))
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents)})
        if name in ("chatml", "plain", "llama-3") and draw(st.integers(0, 5)) == 0:
            messages.append({"role": "assistant", "content": draw(contents)})
            messages.append({"role": "tool", "content": draw(contents)})
        answer = {"role": "assistant", "content": draw(contents)}
        weight = draw(st.sampled_from([None, None, 0, 1]))
        if weight is not None:
            answer["weight"] = weight
        messages.append(answer)
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(contents)})
    return name, messages


def check_laws(name, messages, max_length, module=rows_to_tokens):
    """Everything that holds for the encoding of any chat; returns it."""
    tokenizer = TOKENIZERS[name]
    trained = [
        m["content"] for m in messages if m["role"] == "assistant" and m.get("weight", 1) == 1
    ]
    written = pieces(name, messages)
    full = encode(messages, tokenizer, module=module)
    if isinstance(full, Skipped) or type(full).__name__ == "Skipped":
        # A reason is a fact about the row.
        assert not trained
        assert full.reason == chat_mask.NO_TURN
        return full
    assert trained
    ids, labels = full.input_ids, full.labels
    # Labels are -100 or the ids, and the first token is predicted by nothing.
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert labels[0] == -100
    # The text is the template's; what is supervised is the answers and their end tokens.
    whole = "".join(text for text, _ in written)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == whole
    learnt = tokenizer.decode([t for t in labels if t != -100], clean_up_tokenization_spaces=False)
    if not straddles(tokenizer, written, messages):
        assert learnt == "".join(text for text, learn in written if learn)
    # Control tokens are the template's alone: the BOS, and one end token for each turn.
    bos, end = map(tokenizer.convert_tokens_to_ids, ("<s>", ENDS.get(name, "</s>")))
    assert (ids[0], ids[1:2].count(bos)) == (bos, 0)
    assert labels.count(end) == len(trained)
    template_text = "".join(
        text for text, _ in pieces(name, [{**m, "content": ""} for m in messages])
    )
    for control in CONTROL:
        index = tokenizer.convert_tokens_to_ids(control)
        assert ids.count(index) == template_text.count(control)
    check_truncation(full, messages, tokenizer, max_length, end, module)
    return full


def check_truncation(full, messages, tokenizer, max_length, end, module):
    """A cut chat ends with a whole turn, or is skipped and counted."""
    cut = encode(messages, tokenizer, max_length, module)
    counted = (
        module.encode_rows([row(messages)] * 2, tokenizer, max_length)
        if (type(cut).__name__ == "Encoded" and len(full.input_ids) < 40)
        else None
    )
    if len(full.input_ids) <= max_length:
        assert cut == full
        lost = 0
    elif type(cut).__name__ == "Skipped":
        ends = [i for i, label in enumerate(full.labels) if label == end]
        assert cut.reason in (TOO_LONG, TOO_LONG_ANSWER)
        assert ends[0] >= max_length
    else:
        kept = len(cut.input_ids)
        assert kept <= max_length
        assert cut.truncated
        assert (cut.input_ids, cut.labels) == (full.input_ids[:kept], full.labels[:kept])
        assert cut.labels[-1] == end
        assert end not in full.labels[kept:max_length]
        lost = len(full.input_ids) - kept
    if counted is not None:
        assert (len(counted.rows), counted.cut_tokens, counted.duplicates) == (2, 2 * lost, 1)
        assert counted.tokens == 2 * len(cut.input_ids)


def straddles(tokenizer, written, messages):
    """Whether a token may reach across the beginning or end of an answer."""
    # With control tokens spelled in messages, our tokens are not those of the text.
    if any(control in m["content"] for m in messages for control in [*CONTROL, "\ue002"]):
        return True
    text, borders, done = "".join(part for part, _ in written), set(), 0
    for part, learn in written:
        if learn:
            borders |= {done, done + len(part)}
        done += len(part)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return any(a < border < b for a, b in offsets["offset_mapping"] for border in borders)


@settings(max_examples=800, deadline=None)
@given(chats(), st.integers(2, 120))
def test_the_laws_of_masks_hold_for_random_chats(chat, max_length):
    check_laws(*chat, max_length)


@settings(max_examples=300, deadline=None)
@given(chats())
def test_ids_and_labels_are_upstreams_and_the_maskers(chat):
    # Equal wherever no message spells a control token, which upstream reads as one.
    name, messages = chat
    tokenizer = TOKENIZERS[name]
    result = encode(messages, tokenizer)
    if isinstance(result, Skipped):
        return
    plain = not any(token in m["content"] for m in messages for token in [*CONTROL, "\ue002"])
    shown = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    # Where one is spelled, upstream has an answer of its own.
    options = {} if plain else {"sanitize_control_tokens": True}
    upstream = tokenizer.apply_chat_template(shown, tokenize=True, return_dict=False, **options)
    if plain:
        assert result.input_ids == upstream
        whole = "".join(text for text, _ in pieces(name, messages))
        reference = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        assert reference["input_ids"] == upstream
        offsets = reference["offset_mapping"]
        assert result.labels == labels_of(name, messages, upstream, offsets)
    elif "\ue002" not in "".join(m["content"] for m in messages):
        decode = tokenizer.decode
        assert decode(result.input_ids) == decode(upstream)
        for control in CONTROL:
            index = tokenizer.convert_tokens_to_ids(control)
            assert result.input_ids.count(index) == upstream.count(index)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_generation_is_handed_what_training_puts_before_an_answer(name, adds_bos):
    # One BOS in training and in inference, whoever writes it.
    tokenizer = tokenizer_of(name, adds_bos=adds_bos)
    messages = [{"role": "user", "content": "he 🙂"}]
    before = rows_to_tokens.prompt_ids("he 🙂", tokenizer, chat=True)
    upstream = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    # This tokenizer, like GPT-2's, joins two line ends only where the text ends with them.
    assert before == upstream or name == "llama-3"
    result = encode([*messages, {"role": "assistant", "content": "hello"}], tokenizer)
    assert before.count(tokenizer.bos_token_id) == 1
    unlearnt = result.labels.index(next(label for label in result.labels if label != -100))
    assert tokenizer.decode(before) == tokenizer.decode(upstream)
    assert result.input_ids[:unlearnt] == before


# --- mutations: each branch of the mask is needed -------------------------------------------------

MUTATIONS = {
    "the end token is left out of the turn": (
        "turn_spans",
        "    first, last = len(before.text), len(after.text)\n",
        "    first, last = len(before.text), len(after.text.rstrip()) - 4\n",
    ),
    "the header belongs to the answer": (
        "turn_spans",
        "before = template.render(messages[:index], header=True)",
        "before = template.render(messages[:index], header=False)",
    ),
    "only the last turn is trained on": (
        "chat_mask",
        'trained = [i for i in assistants if messages[i].get("weight", 1)]',
        'trained = [i for i in assistants if messages[i].get("weight", 1)][-1:]',
    ),
    "the weight is not looked at": (
        "chat_mask",
        'trained = [i for i in assistants if messages[i].get("weight", 1)]',
        "trained = list(assistants)",
    ),
    "the line end behind the end token is trained on": (
        "turn_spans",
        "return len(text) if ended else len(turn.text)",
        "return len(turn.text)",
    ),
    "control tokens in messages are control tokens": (
        "rendering",
        '            marked = re.compile(f"{pattern.pattern}|[{OPEN}{CLOSE}{LITERAL}]")\n',
        '            marked = re.compile(f"[{OPEN}{CLOSE}{LITERAL}]")\n',
    ),
    "a cut chat ends anywhere": (
        "labels",
        "length = max((end + shift for end in ends if end + shift <= max_length), default=0)",
        "length = max_length if ends[0] + shift <= max_length else 0",
    ),
    "the template's BOS is followed by the tokenizer's": (
        "tokens",
        "        if ids[: len(self.start)] != self.start:\n",
        "        if True:\n",
    ),
}


COPIED = (
    *("tokens", "rendering", "turn_spans", "chat_mask", "labels"),
    *("token_cache", "encode"),
)
"""In the order in which they import each other."""


def mutated(monkeypatch, module, old, new):
    """Our `encode` on a copy of the code in which `old` is `new`."""
    for name in COPIED:
        source = (Path(rows_to_tokens.__file__).parent / f"{name}.py").read_text()
        if name == module:
            assert source.count(old) == 1, f"the mutation of {name} no longer applies"
            source = source.replace(old, new)
        full = f"qlora_kit.data.{name}"
        spec = importlib.util.spec_from_loader(full, loader=None)
        copy = importlib.util.module_from_spec(spec)
        copy.__file__ = str(Path(rows_to_tokens.__file__).parent / f"{name}.py")
        monkeypatch.setitem(sys.modules, full, copy)
        exec(compile(source, full, "exec"), copy.__dict__)
    return sys.modules["qlora_kit.data.encode"]


def seeded_chats():
    """Chats of each template, each kind of turn and some control tokens."""
    draw = random.Random(0)
    words = ["he", "hello :", "🙂 é", "h\nl", "<|im_end|>", "x</s>", "<|eot_id|> <s>"]
    for name in sorted(TEMPLATES):
        for _ in range(6):
            messages = []
            for _ in range(draw.randint(2, 3)):
                messages.append({"role": "user", "content": draw.choice(words)})
                messages.append({"role": "assistant", "content": draw.choice(words)})
                if draw.random() < 0.4:
                    messages[-1]["weight"] = draw.randint(0, 1)
            messages[-1]["weight"] = 1
            yield name, messages


def test_the_laws_hold_for_the_chats_that_mutations_are_tried_on():
    for name, messages in seeded_chats():
        for max_length in (20, 40, 60):
            assert isinstance(check_laws(name, messages, max_length), Encoded)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mutation_of_the_mask_breaks_a_law(what, monkeypatch):
    module = mutated(monkeypatch, *MUTATIONS[what])
    broken = 0
    for name, messages in seeded_chats():
        for max_length in (20, 40, 60):
            try:
                check_laws(name, messages, max_length, module)
            except AssertionError:
                broken += 1
    assert broken


def test_an_unchanged_copy_breaks_no_law(monkeypatch):
    # The control of the test above: the machinery by itself breaks nothing.
    module = mutated(monkeypatch, "chat_mask", "NO_TURN = ", "NO_TURN  = ")
    for name, messages in seeded_chats():
        check_laws(name, messages, 40, module)


def test_nothing_is_lost_in_silence_among_many_rows():
    rows = [row(messages) for name, messages in seeded_chats() if name == "chatml"]
    rows += [row([{"role": "user", "content": "he"}]), row([{"role": "user", "content": "h" * 99}])]
    result = encode_rows(rows, TOKENIZERS["chatml"], 90)
    assert len(result.rows) + sum(result.skipped.values()) == len(rows)
    assert result.skipped[chat_mask.NO_TURN] == 2
    assert tokens.IGNORE == -100
