"""A rendered chat to ids, each with the characters that it stands for.

Source: transformers' `encode_marked_chat` (5.x).
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.data.tokens import Span, Tokens, in_use, pieces


def chat_tokens(
    tokens: Tokens, text: str, literals: Sequence[Span], limit: int | None = None
) -> tuple[list[int], list[Span]] | None:
    """Ids of a rendered chat and the characters of each, no special token added.

    In the spans `literals`, control tokens are plain text; None where the tokenizer cannot
    take one apart. Of more than `limit` ids the first ones are given, and perhaps not all.
    """
    ids: list[int] = []
    spans: list[Span] = []
    done = 0
    for first, last in [*literals, (len(text), len(text))]:
        for piece in pieces(text[done:first]):
            _append(tokens, text, done, done + len(piece), ids, spans)
            done += len(piece)
            if limit is not None and len(ids) > limit:
                return ids, spans
        before = len(ids)
        # Cut behind its first character, a control token is in neither part.
        _append(tokens, text, first, min(first + 1, last), ids, spans)
        _append(tokens, text, min(first + 1, last), last, ids, spans)
        added = set(tokens.tokenizer.convert_ids_to_tokens(ids[before:]))
        if added & tokens.special or text[first:last] in added & tokens.added:
            return None
        done = last
    return ids, spans


def _append(
    tokens: Tokens, text: str, first: int, last: int, ids: list[int], spans: list[Span]
) -> None:
    """Add the tokens of a part of the text as what follows the parts before it."""
    if first == last:
        return
    # Behind a line end, which is taken off again: at the beginning of a text some tokenizers
    # put a space before the first word.
    lead = "\n" if first else ""
    more, places = _with_places(tokens, lead + text[first:last])
    if any(place[0] < len(lead) < place[1] for place in places):
        lead = ""
        more, places = _with_places(tokens, text[first:last])
    kept = [i for i, place in enumerate(places) if not lead or place[1] > len(lead)]
    ids += [more[i] for i in kept]
    shift = first - len(lead)
    spans += [(places[i][0] + shift, places[i][1] + shift) for i in kept]


def _with_places(tokens: Tokens, text: str) -> tuple[list[int], list[Span]]:
    with in_use(tokens.tokenizer):
        encoded = tokens.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])
