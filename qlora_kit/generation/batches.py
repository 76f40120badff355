"""The requests that share a forward: their rows, and what takes part beside the base for each.

A request has the tensors of its adapter in hand from when it was taken: one that is removed from
the bank, or replaced under its name, goes on for the requests that had it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qlora_kit.base.packed_matmul import Copies
from qlora_kit.errors import ConfigError
from qlora_kit.generation.group import Group
from qlora_kit.generation.request import Ticket
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import lora_layers
from qlora_kit.lora.merged import Merged
from qlora_kit.lora.switch import Active
from qlora_kit.process.out_of_memory import is_out_of_memory


class RowAdapters:
    """Those of a bank for one model; without a bank, what takes part in the model is left alone.

    Errors: `ConfigError` for a bank of another model.
    """

    def __init__(self, model: nn.Module, bank: AdapterBank | None) -> None:
        if bank is not None and bank.base.model is not model:
            raise ConfigError(
                "the bank of adapters is for another model than the one that decodes",
                "give the model of the bank's base, or a bank for this model",
            )
        self._bank = bank
        # An adapter of the model's own, which is no part of the bank, is set aside too.
        self._adapted = bank is not None and bool(lora_layers(model))

    def find(self, name: str | None, what: str = "the request") -> Active | None:
        """The adapter of that name, for a request that is called `what`.

        Errors: `AdapterError` for an unknown name, `ConfigError` for one where there is no bank.
        """
        if self._bank is not None:
            return self._bank.rows([name])
        if name is not None:
            raise ConfigError(
                f"{what} is for the adapter {name!r}, and there is no bank of adapters",
                "give a bank that has it",
            )
        return None

    def together(self, rows: Sequence[Active | None]) -> Active | None:
        """What takes part for rows with these adapters, in their order."""
        if self._bank is None or all(one is rows[0] for one in rows):
            return rows[0]
        return self._bank.together(rows)

    @staticmethod
    def apart(active: Active | None) -> Hashable:
        """Rows for which this is equal may share a forward: a merged adapter is by itself."""
        return active if isinstance(active, Merged) else None

    @contextlib.contextmanager
    def taking(self, active: Active | None) -> Iterator[None]:
        """Inside, that takes part; afterwards what took part before."""
        # The first adapter that comes into a bank makes the reference of the model.
        if self._bank is None or not (self._adapted or self._bank.names or active):
            yield
            return
        with self._bank.step(active):
            yield


@dataclass(eq=False)
class Batch:
    """The requests of a group, in the order of its rows."""

    group: Group
    tickets: list[Ticket]
    active: Active | None

    def logits(self, adapters: RowAdapters, copies: Copies | None) -> Tensor | Exception | None:
        """Those of the next tokens (B, V), or what was raised where memory ended.

        None where a part of the prompt is computed, and not all of it.
        """
        try:
            with adapters.taking(self.active):
                return self.group.logits(copies)
        except Exception as error:
            return _out_of_memory(error)

    def join(
        self, others: Sequence[Batch], mixed: Callable[[Sequence[Ticket]], Active | None]
    ) -> Exception | None:
        """Take in the rows of others, each after its step; `mixed` says what takes part for all.

        What was raised where memory ended: this batch is what it was then, and the others are lost.
        """
        tickets = [ticket for batch in (self, *others) for ticket in batch.tickets]
        try:
            active = mixed(tickets)
            self.group.join([other.group for other in others])
        except Exception as error:
            return _out_of_memory(error)
        self.tickets, self.active = tickets, active
        return None

    def fail(self, error: Exception) -> list[Ticket]:
        """End its requests by an error; those that had not ended."""
        ended = [ticket for ticket in self.tickets if ticket.end is None]
        for ticket in ended:
            ticket.leave("error", error)
        return ended


def _out_of_memory(error: Exception) -> Exception:
    if not is_out_of_memory(error):
        raise error
    # Its frames hold tensors.
    return error.with_traceback(None)


def by(items: Sequence[Any], key: Callable[[Any], Hashable]) -> Iterator[list[Any]]:
    """The items of one key together, in the order in which keys first come."""
    found: dict[Hashable, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    yield from found.values()
