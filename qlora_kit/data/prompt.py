"""A row to token ids and labels: what the model reads, and which tokens it learns to write.

Every sequence starts with what the tokenizer puts before a text (one BOS, or none), and a label is
the token itself where it is trained on, else -100; the first token has nothing before it that
could predict it, so its label is always -100.

- text: start + text + EOS; all of it is trained on.
- prompt, completion: start + prompt + completion + EOS; completion and EOS are trained on. The two
  are tokenized apart: a token across the border would be one that generation, which is handed the
  prompt alone, could never begin with.
- messages: the tokenizer's chat template; each assistant turn is trained on, its end tokens too.
  The turns are where the template says `{% generation %}`, else where its renderings of the first
  i and i + 1 messages end. Ids are never searched for: EOS is trained on also where it pads.

Control tokens written in a row's own text are plain text to the model. A row beyond `max_length`
is cut at its end. What cannot be trained on is skipped, with the reason.

Left out: packing, caching, templates of our own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.data.read import Row
from qlora_kit.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is not trained on; torch's own choice."""

TOO_LONG = "prompt longer than max_length"
NO_TURN = "no assistant turn"
ONE_TOKEN = "a single token"
CONTROL = "a message spells a control token"
INSIDE = "a turn begins inside a token"
REMEDIES = {
    TOO_LONG: "raise --max_length or shorten the prompts",
    NO_TURN: "give every conversation an assistant turn",
    ONE_TOKEN: "give longer rows",
    CONTROL: "take the control tokens out of the messages' text",
    INSIDE: "use rows of prompt and completion",
}
"""What to do about each reason for skipping a row."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it; both lists have its length in tokens."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be trained on; `reason` is a key of `REMEDIES`."""

    reason: str


@dataclass(frozen=True)
class EncodedRows:
    """The rows that are trained on, and what became of the others."""

    rows: list[Encoded]
    skipped: dict[str, int]
    truncated: int
    tokens: int
    supervised_tokens: int


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_prompt: bool = False,
) -> EncodedRows:
    """Every row encoded, in order; `DataError` where more than half of them are lost."""
    frame = _Frame(tokenizer)
    kept: list[Encoded] = []
    lost: list[tuple[Row, str]] = []
    for row in rows:
        result = _encode(row, frame, max_length, train_on_prompt)
        if isinstance(result, Encoded):
            kept.append(result)
        else:
            lost.append((row, result.reason))
    skipped = Counter(reason for _, reason in lost)
    if not rows:
        raise DataError("there are no rows to encode", "give at least one row")
    if not kept or len(lost) > len(rows) / 2:
        counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        raise DataError(
            f"{lost[0][0].where}: {len(lost)} of {len(rows)} rows, from here on, cannot be "
            f"trained on ({counts}; max_length {max_length})",
            REMEDIES[skipped.most_common(1)[0][0]],
        )
    return EncodedRows(
        rows=kept,
        skipped=dict(skipped),
        truncated=sum(row.truncated for row in kept),
        tokens=sum(len(row.input_ids) for row in kept),
        supervised_tokens=sum(len(row.labels) - row.labels.count(IGNORE) for row in kept),
    )


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False
) -> Encoded | Skipped:
    """One row as ids and labels of at most `max_length` tokens, at least one of them trained on.

    `TokenizerError` where the tokenizer cannot say where a row or a turn ends.
    """
    return _encode(row, _Frame(tokenizer), max_length, train_on_prompt)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[int]:
    """The ids that training puts before a completion, or before the answer to a first message."""
    frame = _Frame(tokenizer)
    if not chat:
        return [*frame.start, *frame.plain(prompt)]
    messages = [{"role": "user", "content": prompt}]
    if frame.spells_control(messages):
        raise DataError(f"prompt: {CONTROL}", "leave the control token out")
    text = frame.render(messages, "prompt", add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return frame.one_start(list(ids), [False] * len(ids))[0]


class _Frame:
    """What a tokenizer puts around a text, read off once for many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        # Asked of the tokenizer, not of `bos_token`: GPT-2 has one that it never puts first.
        whole = list(self.tokenizer("a")["input_ids"])
        alone = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        place = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        self.start = whole[:place]
        self.control: dict[int, str] = {
            index: token.content
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @property
    def eos(self) -> int:
        """The token that ends a row; without one a model would never learn to stop."""
        eos: int | None = self.tokenizer.eos_token_id
        if eos is None:
            raise TokenizerError(
                "the tokenizer has no end-of-sequence token", "set eos_token in its config"
            )
        return eos

    def plain(self, text: str) -> list[int]:
        """Ids of the text alone; `</s>` in it is four characters, not the end."""
        ids = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return list(ids["input_ids"])

    def spells_control(self, messages: list[dict[str, str]]) -> bool:
        """Whether a template would turn a message's own text into control tokens."""
        return any(token in turn["content"] for turn in messages for token in self.control.values())

    def template(self, where: str) -> str:
        """The chat template's text."""
        if not self.tokenizer.chat_template:
            raise TokenizerError(
                f"{where}: the tokenizer has no chat template",
                "use rows of prompt and completion, or a tokenizer with a template",
            )
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:
            raise TokenizerError(f"{where}: {error}", "name one template default") from error

    def render(self, messages: list[dict[str, str]], where: str, **options: Any) -> Any:
        """`apply_chat_template`, as text unless `options` say otherwise."""
        self.template(where)
        try:
            return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
        except Exception as error:
            # A template is a program out of a file: it raises what it likes, often on purpose.
            raise DataError(
                f"{where}: the chat template refuses the messages: {error}",
                "give the order and the roles that the model was made for",
            ) from error

    def one_start(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """The start exactly once, whether the template writes it never, once or again."""
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids, trained = ids[1:], trained[1:]
        if ids[: len(self.start)] != self.start:
            ids, trained = self.start + ids, [False] * len(self.start) + trained
        return ids, trained


def _encode(row: Row, frame: _Frame, max_length: int, train_on_prompt: bool) -> Encoded | Skipped:
    content = row.content
    if "messages" in content:
        if not any(turn["role"] == "assistant" for turn in content["messages"]):
            return Skipped(NO_TURN)
        if frame.spells_control(content["messages"]):
            return Skipped(CONTROL)
        spans = _chat(row, frame)
        if isinstance(spans, Skipped):
            return spans
        ids, trained = frame.one_start(*spans)
    else:
        prompt = frame.plain(content["prompt"]) if "prompt" in content else []
        text = content["completion" if "prompt" in content else "text"]
        learned = [*frame.plain(text), frame.eos]
        ids = [*frame.start, *prompt, *learned]
        trained = [False] * (len(ids) - len(learned)) + [True] * len(learned)
    fixed = max(1, len(frame.start))
    if train_on_prompt:
        trained = [True] * len(ids)
    labels = [
        token if learn and place >= fixed else IGNORE
        for place, (token, learn) in enumerate(zip(ids, trained, strict=True))
    ][:max_length]
    if len(labels) <= 1:
        return Skipped(ONE_TOKEN)
    if labels.count(IGNORE) == len(labels):
        return Skipped(TOO_LONG)
    return Encoded(ids[:max_length], labels, truncated=len(ids) > max_length)


def _chat(row: Row, frame: _Frame) -> tuple[list[int], list[bool]] | Skipped:
    """The template's ids, and which of them belong to assistant turns."""
    messages = row.content["messages"]
    if not frame.tokenizer.is_fast:
        raise TokenizerError(
            f"{row.where}: the tokenizer does not say where in a text its tokens are",
            "use a tokenizer with tokenizer.json, or rows of prompt and completion",
        )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", frame.template(row.where)):
        return _between_prefixes(row, frame)
    encoded = frame.render(
        messages, row.where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = list(encoded["input_ids"]), [mask == 1 for mask in encoded["assistant_masks"]]
    following = zip(trained, [*trained[1:], False], strict=True)
    ends = [place + 1 for place, (now, then) in enumerate(following) if now and not then]
    if len(ends) != sum(turn["role"] == "assistant" for turn in messages):
        raise TokenizerError(
            f"{row.where}: the chat template's {{% generation %}} marks {len(ends)} of the "
            "assistant turns",
            "mark every assistant turn in the template, or take the marks out",
        )
    # A model that never sees the end of its turn trained does not learn to stop.
    after_last = ids[ends[-1] :] if messages[-1]["role"] == "assistant" else []
    if frame.control.keys() & after_last or any(ids[end : end + 1] == [frame.eos] for end in ends):
        raise TokenizerError(
            f"{row.where}: the chat template's {{% generation %}} leaves out the turn's end token",
            "put the end token inside {% generation %}, or take the marks out",
        )
    return ids, trained


def _between_prefixes(row: Row, frame: _Frame) -> tuple[list[int], list[bool]] | Skipped:
    """Assistant turns as what a rendering has more than the rendering of the messages before.

    Each shorter rendering must be the beginning of the longer one, which is checked, not assumed:
    templates may well write an earlier turn differently once it is not the last.
    """
    messages = row.content["messages"]
    whole = frame.render(messages, row.where)
    encoded = frame.tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    trained = [False] * len(offsets)
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = frame.render(messages[:index], row.where, add_generation_prompt=True)
        after = frame.render(messages[: index + 1], row.where)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            raise TokenizerError(
                f"{row.where}: the chat template writes message {index} differently when others "
                "follow, so its place cannot be told",
                "use a template with {% generation %}, or rows of prompt and completion",
            )
        for place, (first, last) in enumerate(offsets):
            if first < len(before) < last:
                return Skipped(INSIDE)
            trained[place] |= len(before) <= first < len(after)
    return list(encoded["input_ids"]), trained
