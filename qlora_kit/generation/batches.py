"""The requests that share a forward: their rows, and what takes part beside the base for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_kit.base.packed_matmul import Copies
from qlora_kit.generation.adapters import RowAdapters
from qlora_kit.generation.group import Group
from qlora_kit.generation.request import Ticket
from qlora_kit.lora.switch import Active
from qlora_kit.process.out_of_memory import is_out_of_memory


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
