"""Texts to token ids with one tokenizer: what it puts before a text, and its control tokens.

A control token is a special token, or an added one that the chat template itself writes (`<think>`,
`<tool_call>`). Spelled in a message it must reach the model as the characters that stand there.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from qlora_kit.data.chat_template import literal_text
from qlora_kit.errors import QloraKitError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is not trained on; torch's own choice."""

BLANKS = 16
"""Tokens of blanks that may stand behind an end that a text spells."""

PIECE = 2**18
"""Characters that are tokenized at a time: a tokenizer takes some hundred bytes for each."""

Ids: TypeAlias = "list[int] | array[int]"
"""Token ids; an array where they are many."""

Span = tuple[int, int]
"""A half-open range of characters."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it; both lists have its length in tokens."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be trained on; `reason` is a key of `labels.REMEDIES`."""

    reason: str


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, cut where that changes no token.

    That is between lines of text: tokens hold a line end with what is before it, or runs of blank
    lines, but no tokenizer joins a line end to the next word. Else it is before a single blank,
    and in text without any (of `PIECE` characters) anywhere.
    """
    done = 0
    while len(text) - done > PIECE:
        part = text[done : done + PIECE]
        cuts = [match.start() + 1 for match in re.finditer(r"(?<=\S)\n(?=\S)", part[PIECE // 2 :])]
        if not cuts:
            cuts = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", part[PIECE // 2 :])]
        size = PIECE // 2 + cuts[-1] if cuts else PIECE
        yield part[:size]
        done += size
    yield text[done:]


@contextlib.contextmanager
def in_use(tokenizer: Any) -> Iterator[None]:
    """Whatever a tokenizer raises on a text, as ours. Errors: `TokenizerError`.

    A panic of the Rust library is no `Exception`: a pattern that takes too long raises one.
    """
    try:
        yield
    except (QloraKitError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{tokenizer.name_or_path}: the tokenizer fails on a text: {str(error)[:160]}",
            "correct tokenizer.json, or fetch the tokenizer's files again",
        ) from error


class Tokens:
    """What a tokenizer does with texts, read off once for many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        # Asked of the tokenizer, not of `bos_token`: GPT-2 has one that it never puts first.
        with in_use(tokenizer):
            whole = list(self.tokenizer("a")["input_ids"])
            alone = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        places = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        place = next(places, None)
        if not alone or place is None:
            raise TokenizerError(
                f"{tokenizer.name_or_path}: 'a' is encoded as {str(alone)[:60]}, and with special "
                f"tokens as {str(whole)[:60]}",
                "correct the post_processor of tokenizer.json, or fetch the file again",
            )
        self.start = whole[:place]
        # SentencePiece, and GPT-2 with add_prefix_space, put a space before a text.
        self._adds_space = self.plain("\na") != self.plain("\n") + self.plain("a")
        added = self.tokenizer.added_tokens_decoder.values()
        self.special = {token.content for token in added if token.special}
        self.special_ids = {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        } - {self.tokenizer.unk_token_id}
        self.added = {token.content for token in added}
        # Some vocabularies add runs of blanks and of line ends.
        self.added_ids = {self.tokenizer.eos_token_id} | {
            index
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if token.content.strip(" \n\t▁")
        }
        self._controls: dict[str, re.Pattern[str]] = {}
        self.read: dict[tuple[Any, ...], bool] = {}
        """kinds of chats, and whether the template writes what is answered (`chat_mask.py`)"""

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
        return self.read_many([text], literal=True)[0]

    def read_many(
        self, texts: Sequence[str], literal: bool, behind: bool = False
    ) -> list[list[int]]:
        """Ids of many texts, which a fast tokenizer does in parallel, no special token added.

        A control token that a text spells is that token or, where `literal`, its characters. What
        stands `behind` another text gets no space in front, as some tokenizers put before a text:
        the ids of both decode to both texts and nothing between them.
        """
        options = {"add_special_tokens": False, "split_special_tokens": literal, "verbose": False}
        if behind and self._adds_space:
            return self._behind(texts, literal, options)
        if not self.tokenizer.is_fast:
            with in_use(self.tokenizer):
                return [list(self.tokenizer(text, **options)["input_ids"]) for text in texts]
        with self._library(options) as backend:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def _behind(
        self, texts: Sequence[str], literal: bool, options: dict[str, Any]
    ) -> list[list[int]]:
        """The ids of texts behind a line end, which is taken off again."""
        lines = ["\n" + text for text in texts]
        kept: list[list[int] | None]
        if self.tokenizer.is_fast:
            with self._library(options) as backend:
                encoded = backend.encode_batch(lines, add_special_tokens=False)
            kept = [
                None
                if any(first < 1 < last for first, last in one.offsets)
                else [i for i, (_, last) in zip(one.ids, one.offsets, strict=True) if last > 1]
                for one in encoded
            ]
        else:
            lead = self.plain("\n")
            read = self.read_many(lines, literal)
            kept = [ids[len(lead) :] if ids[: len(lead)] == lead else None for ids in read]
        return [
            self.read_many([text], literal)[0] if ids is None else ids
            for text, ids in zip(texts, kept, strict=True)
        ]

    @contextlib.contextmanager
    def _library(self, options: dict[str, Any]) -> Iterator[Any]:
        """The library below in the state that a call with `options` puts it into.

        That is control tokens as asked, no padding, no truncation. Asked through transformers it
        also works out places.
        """
        backend = self.tokenizer.backend_tokenizer
        before = backend.encode_special_tokens
        try:
            with in_use(self.tokenizer):
                self.tokenizer("", **options)
                yield backend
        finally:
            backend.encode_special_tokens = before

    def read_long(
        self, text: str, literal: bool, limit: int | None = None, behind: bool = False
    ) -> Ids:
        """`read_many` of one text in bounded memory; of more than `limit` ids perhaps not all."""
        ids = array("i")
        for number, piece in enumerate(pieces(text)):
            ids.extend(self.read_many([piece], literal, behind or number > 0)[0])
            if limit is not None and len(ids) > limit:
                break
        return ids

    @property
    def unknown(self) -> int | None:
        """The token for what the tokenizer does not know, where it is that and nothing else."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        unknown: int | None = self.tokenizer.unk_token_id
        return None if unknown in (*known, self.tokenizer.pad_token_id) else unknown

    def count_controls(self, ids: Ids) -> int:
        """How many control tokens a text spells."""
        return sum(ids.count(index) for index in self.special_ids.intersection(ids))

    def without_start(self, ids: Ids) -> tuple[Ids, int]:
        """A text's ids without a start that it spells itself, and how many of them that were.

        One is put before every text by the tokenizer, where it does so at all.
        """
        start, done = self.start, 0
        while start and list(ids[done : done + len(start)]) == start:
            done += len(start)
        bos = self.tokenizer.bos_token_id
        while len(ids) > done + 1 and ids[done] == ids[done + 1] == bos:
            done += 1
        return ids[done:], done

    def with_end(self, ids: Ids, text: str) -> tuple[Ids, int]:
        """A text's ids with EOS at the end, and how often the text itself spells it there.

        Blanks may stand behind it.
        """
        eos, result = self.eos, ids[:]
        if not text.rstrip().endswith(self.tokenizer.eos_token) or eos not in ids[-BLANKS:]:
            result.append(eos)
            return result, 0
        last = len(ids) - 1
        while ids[last] != eos:
            last -= 1
        first = last
        while first and ids[first - 1] == eos:
            first -= 1
        del result[first:last]
        return result, last - first + 1

    def controls(self, template: str, of_assistant: bool) -> re.Pattern[str]:
        """What may not be read as a token in a message.

        An assistant's own text may hold the added tokens that are not special: they are how a
        model writes its thoughts and its calls.
        """
        key = f"{of_assistant}{template}"
        if key not in self._controls:
            found = set(self.special)
            if not of_assistant:
                literal = literal_text(template)
                found |= {t for t in self.added if t in literal and not t.isspace()}
            longest_first = sorted(found, key=len, reverse=True)
            self._controls[key] = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        return self._controls[key]

    def one_start(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """The start exactly once, whether the template writes it never, once or again."""
        while len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids, trained = ids[1:], trained[1:]
        if ids[: len(self.start)] != self.start:
            ids, trained = self.start + ids, [False] * len(self.start) + trained
        return ids, trained


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of some ids, without the clean-up of spaces, which rewrites what is shown."""
    with in_use(tokenizer):
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
