"""What is said of encoded rows beside their counts: lost, cut, unused, read as tokens, unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.data.encode import EncodedRows

FIELDS = 12
"""Unused fields that are named in the note; `show-data --json` has all."""


def notes_of(encoded: EncodedRows, held_out: bool = False) -> Sequence[str]:
    """A line for each thing that is not as one might take it to be; `held_out` is said with each.

    In the order of what costs most: rows, tokens, fields, then how text was read.
    """
    rows = "held-out rows" if held_out else "rows"
    notes = [f"{count} {rows} skipped: {reason}" for reason, count in encoded.skipped.items()]
    for what, count, tokens in encoded.cut:
        lost = f", {tokens:,} tokens lost" if tokens else ""
        notes.append(f"{count} {rows} truncated{lost}: {what}")
    if encoded.unused:
        named = [f'"{name}" ({count:,})' for name, count in encoded.unused[:FIELDS]]
        if len(encoded.unused) > FIELDS:
            named.append(f"and {len(encoded.unused) - FIELDS} more")
        notes.append(f"fields of {rows} that are not used: {', '.join(named)}")
    if encoded.controls:
        notes.append(
            f"{encoded.controls:,} control tokens spelled in {rows} are read as tokens; "
            "--literal_control_tokens reads them as characters"
        )
    if encoded.doubled:
        notes.append(f"{encoded.doubled:,} starts and ends that {rows} spell are written once")
    if encoded.unknown_tokens:
        share = encoded.unknown_tokens / max(1, encoded.tokens)
        notes.append(
            f"{encoded.unknown_tokens:,} tokens of {rows} ({share:.2%}) are <unk>: the tokenizer "
            "does not know what stands there"
        )
    if encoded.duplicates:
        notes.append(f"{encoded.duplicates} {rows} are the same as an earlier one")
    return notes
