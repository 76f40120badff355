"""An adapter merged in memory for a command, and how far the copy is from the adapter beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.errors import DataError
from qlora_kit.export.verify import compare, decoded
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.merged import check_bits
from qlora_kit.options.checks import size_text
from qlora_kit.options.parsed import Parsed
from qlora_kit.process.streams import note
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.verification import verification_rows

COMPARED = 512
"""Tokens on which a copy is compared: both are read twice, before the first answer."""


def asked_bits(parsed: Parsed, base: Base) -> int | None:
    """The bits that a command is asked to merge its adapter in. Errors: `ConfigError`."""
    if AdaptersConfig not in parsed.groups:
        return None
    bits = parsed[AdaptersConfig].merge_in_memory
    if bits is not None:
        check_bits(base, bits)
    return bits


def merge_in_memory(bank: AdapterBank, name: str, adapter: SavedAdapter, bits: int) -> None:
    """Merge an adapter of the bank; say what that takes, and the distance on held-out rows.

    It is used when the bank is asked for it the next time. Errors: as `AdapterBank.merge`.
    """
    base = bank.base
    pad_id = padding_id(base.tokenizer)
    try:
        rows = list(_first(verification_rows(adapter, None, base, note)[0]))
    except DataError as error:
        merged, distance = bank.merge(name, bits), f"not compared ({error.problem})"
    else:
        with bank.using(name):
            beside = decoded(base.model, rows, pad_id)
        merged = bank.merge(name, bits)
        with bank.using(name):
            found = compare(beside, decoded(base.model, rows, pad_id).pieces())
        distance = (
            f"KL {found.kl:.2g} nats a token, likeliest token the same for "
            f"{found.top1_agreement:.1%}, largest difference of a logit "
            f"{found.max_logit_difference:.2g}, over {found.tokens} tokens"
        )
    note(
        f"{name} merged in {bits} bits takes {size_text(merged.nbytes)} beside the base; from the "
        f"adapter unmerged: {distance}"
    )


def _first(rows: Sequence[Any]) -> Iterator[Any]:
    """The first encoded rows, up to the one with which enough tokens are compared."""
    tokens = 0
    for row in rows:
        yield row
        tokens += len(row.input_ids) - 1
        if tokens >= COMPARED:
            return
