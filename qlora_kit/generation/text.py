"""The text of tokens that come one by one, in final pieces, and where it stops."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.tokens import in_use

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTEXT, CUT_EVERY = 4, 16
"""Tokens that are decoded with the new ones at least, and how many come between two cuts."""
FROM_PROMPT = 64
"""Tokens of a prompt that are looked at and decoded again at most, whatever it ends in."""


class AnswerText:
    """The text of one answer, pushed token by token; what is given is final.

    With `after`, the prompt's tokens, it is what the answer adds to its text: the space before the
    first word is kept, which some tokenizers drop at the beginning of a text. Held back is what a
    later token could still change, bytes that are not yet a character, and what may be the
    beginning of one of `stops`, of which nothing is given.

    The text of a part differs from the part of the text: byte fallback, joined spaces, a beginning
    that is stripped. So a token is decoded together with those before it, back to a place where
    characters are whole and no run of byte tokens goes on, and some tokens further.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        after: Sequence[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._until = tokenizer, _Until(stops)
        after = self._end_of(after)
        whole = len(after)
        while whole and not self._ends_a_text(after[whole - 1]):
            whole -= 1
        self._seen = [*self._recent(after[:whole]), *after[whole:]]
        self._text = _decoded(tokenizer, self._seen)
        self._given, self._since_cut = self._text.rstrip("\ufffd"), 0

    @property
    def stopped(self) -> bool:
        """Whether one of `stops` has come: nothing is given any more."""
        return self._until.stopped

    def push(self, token: int) -> str:
        """The text that is final with this token, and has not been given."""
        return self._until.push(self._final(token))

    def finish(self) -> str:
        """The rest, after the last token."""
        # Not simply a continuation where an answer spoils a run of bytes that its prompt ends with.
        given, text = self._given, self._text
        rest = text[len(os.path.commonprefix((given, text))) :]  # noqa: RUF071
        self._given = text
        return self._until.push(rest) + self._until.finish()

    def _final(self, token: int) -> str:
        self._seen.append(token)
        before, self._text = self._text, _decoded(self._tokenizer, self._seen)
        # Incomplete UTF-8 decodes to U+FFFD. With byte fallback, one bad byte turns the whole run
        # of byte tokens into U+FFFD, complete characters included, so a run waits for its end;
        # a special token, which adds nothing, does not end it.
        if self._text == before or self._is_byte(token):
            return ""
        final = self._text.rstrip("\ufffd")
        if not final.startswith(self._given) or len(final) == len(self._given):
            return ""
        piece, self._given = final[len(self._given) :], final
        self._since_cut += 1
        if self._since_cut >= CUT_EVERY and self._ends_a_text(token):
            self._seen, self._since_cut = self._recent(self._seen), 0
            self._text = self._given = _decoded(self._tokenizer, self._seen)
        return piece

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that are text, from the beginning of a character on."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = {token for token, one in added.items() if one.special}
        text = (token for token in reversed(prompt) if token not in special)
        last = [*itertools.islice(text, FROM_PROMPT)][::-1]
        cut = 0
        if len(last) == FROM_PROMPT:
            # With byte fallback the rest of one would spoil the run of bytes that follows it.
            while cut < len(last) and "<0x80>" <= self._name(last[cut]) <= "<0xBF>":
                cut += 1
        return last[cut:]

    def _recent(self, ids: Sequence[int]) -> list[int]:
        """The last of some tokens, of which the last ends a text."""
        for start in range(len(ids) - CONTEXT, 0, -1):
            if self._ends_a_text(ids[start - 1]):
                return list(ids[start:])
        return list(ids)

    def _ends_a_text(self, token: int) -> bool:
        """Whether a token ends with a whole character that is no blank.

        No later token changes that, and what it adds does not depend on what stood before.
        """
        text = "" if self._is_byte(token) else _decoded(self._tokenizer, [token])
        return text[-1:].strip() not in ("", "\ufffd")

    def _is_byte(self, token: int) -> bool:
        return bool(_BYTE_TOKEN.fullmatch(self._name(token)))

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))


class _Until:
    """A text that comes in pieces, up to the first of `stops`, of which no part is given either."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.stopped = stops, "", False
        self._longest = max(map(len, stops), default=1) - 1

    def push(self, piece: str) -> str:
        if self.stopped:
            return ""
        held = self._held + piece
        if (end := stop_at(held, self._stops)) is not None:
            self.stopped, self._held = True, ""
            return held[:end]
        kept = next(
            (
                size
                for size in range(min(self._longest, len(held)), 0, -1)
                if any(stop.startswith(held[-size:]) for stop in self._stops)
            ),
            0,
        )
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest


def added_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], after: Sequence[int] = ()
) -> str:
    """What `ids` add to the text of the tokens before them: the pieces of `AnswerText` joined."""
    before, text = _decoded(tokenizer, after), _decoded(tokenizer, [*after, *ids])
    before = before.rstrip("\ufffd")
    return text[len(os.path.commonprefix((before, text))) :]  # noqa: RUF071


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
