"""Sentencepiece's scores of a vocabulary that has merges, in llama.cpp's reading.

The library `tokenizers` merges the two neighbours whose pair has the lowest rank in a list of
pairs. llama.cpp, like sentencepiece itself, has no pairs: it merges the two neighbours whose
concatenation is the token of the highest score. Both give the same tokens where

- every way to put a token together out of two others is in the list (else llama.cpp merges what
  `tokenizers` does not), and
- the pairs of one token stand together in it, so that the rank of the token is the pair's.

Then minus the place of a token's first pair is its score. A list that sentencepiece's vocabulary
was turned into has both properties; one that `tokenizers` trained need not, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from qlora_kit.errors import TokenizerError

Pair = tuple[str, str]
LOWEST = -1e9
"""The score of what is put together of nothing: llama.cpp takes anything else first."""


def scores_of(vocabulary: Collection[str], merges: Sequence[Pair]) -> dict[str, float]:
    """The score of each token of `vocabulary` that can be merged. Errors: `TokenizerError`."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    _check_complete(vocabulary, set(merges))
    _check_together(first, last)
    return {token: -float(rank) for token, rank in first.items()}


def _check_complete(vocabulary: Collection[str], merges: Collection[Pair]) -> None:
    known = set(vocabulary)
    missing = [pair for pair in _pairs(known) if pair not in merges]
    if missing:
        left, right = missing[0]
        raise TokenizerError(
            f"the tokenizer's merges are not a sentencepiece's: {left!r} + {right!r} is a token, "
            f"but no merge ({len(missing)} such pairs), and llama.cpp would merge it",
            "export to --format hf",
        )


def _pairs(known: Collection[str]) -> Iterable[Pair]:
    """Every way to put a token together out of two others."""
    for token in known:
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                yield token[:cut], token[cut:]


def _check_together(first: Mapping[str, int], last: Mapping[str, int]) -> None:
    """Refuse tokens whose pairs stand among those of another, unless both are runs of a character.

    Runs of spaces have one score in some vocabularies, and then no order that could be kept.
    """
    before: str | None = None
    for token in sorted(first, key=first.__getitem__):
        mixed = before is not None and last[before] > first[token]
        if mixed and (len(set(token)) > 1 or len(set(before or "")) > 1):
            raise TokenizerError(
                f"the tokenizer's merges are not a sentencepiece's: those of {before!r} and "
                f"{token!r} are mixed, and llama.cpp has one rank for all of a token",
                "export to --format hf",
            )
        if before is None or last[token] > last[before]:
            before = token
