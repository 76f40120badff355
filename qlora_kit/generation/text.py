"""The text of tokens that come one by one, in final pieces, and where it stops."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.tokens import in_use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def stream_text(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int | None], *, after: Sequence[int] = ()
) -> Iterator[str]:
    """The text of one row in pieces, each final when it comes.

    The pieces together are the decoding of all `ids` (special tokens and None skipped). What a
    later token could still change is held back: bytes that are not yet a character. With `after`,
    the prompt's tokens, the pieces are what `ids` add to its text: the space before the first word
    is kept, which some tokenizers drop at the beginning of a text.
    """
    seen = list(after)
    text = _decoded(tokenizer, seen)
    printed = text.rstrip("\ufffd")
    for token in ids:
        if token is None:
            continue
        seen.append(token)
        # All of it again, 1 ms for 1,000 tokens: byte fallback, joined spaces and added tokens
        # make the text of a part differ from the part of the text.
        before, text = text, _decoded(tokenizer, seen)
        # Incomplete UTF-8 decodes to U+FFFD. With byte fallback, one bad byte turns the whole run
        # of byte tokens into U+FFFD, complete characters included, so a run waits for its end;
        # a special token, which adds nothing, does not end it.
        if text == before or _BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(token))):
            continue
        final = text.rstrip("\ufffd")
        if final.startswith(printed) and len(final) > len(printed):
            yield final[len(printed) :]
            printed = final
    # Not simply a continuation where `ids` spoil a run of bytes that `after` ends with.
    rest = text[len(os.path.commonprefix((printed, text))) :]  # noqa: RUF071
    if rest:
        yield rest


def added_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()
) -> str:
    """What `ids` add to the text of the tokens before them: the pieces of `stream_text` joined."""
    before, text = _decoded(tokenizer, after), _decoded(tokenizer, [*after, *ids])
    before = before.rstrip("\ufffd")
    return text[len(os.path.commonprefix((before, text))) :]  # noqa: RUF071


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text before the first of `stops`, of which no part is shown either."""
    held = ""
    for piece in pieces:
        held += piece
        if (end := stop_at(held, stops)) is not None:
            yield held[:end]
            return
        longest = max(map(len, stops), default=1) - 1
        kept = next(
            (
                size
                for size in range(min(longest, len(held)), 0, -1)
                if any(stop.startswith(held[-size:]) for stop in stops)
            ),
            0,
        )
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def stop_at(text: str, stops: Sequence[str]) -> int | None:
    """Where that of `stops` begins whose end comes first in a text, or None."""
    found = [(place + len(one), place) for one in stops if (place := text.find(one)) >= 0]
    return min(found)[1] if found else None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Without the clean-up of spaces, which rewrites text that is printed already.
    with in_use(tokenizer):
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
