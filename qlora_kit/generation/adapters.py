"""What takes part beside the base for the rows of a batch, each with an adapter of its own or none.

A request has the tensors of its adapter in hand from when it was taken: one that is removed from
the bank, or replaced under its name, goes on for the requests that had it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

from torch import nn

from qlora_kit.errors import ConfigError
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import lora_layers
from qlora_kit.lora.merged import Merged
from qlora_kit.lora.switch import Active


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
