"""AdapterBank: many adapters on one frozen base, of which each call takes one, or one a row.

The base is held once, in 4, 8 or 16 bits, and no adapter ever changes it: an adapter is a pair of
small matrices for each linear that it adapts, kept beside the model in the adapter's own dtype. A
switch sets the one reference that all adapted linears read (`switch.py`), so that it costs the same
for one linear and for all of a large model, for one adapter and for a thousand.

An adapter is checked and read whole before anything changes, and comes into the bank by one
assignment. So a fault leaves bank and model as they were, and another thread may add and remove
while one decodes: what takes part there stays what it is. Adding rests between pieces while other
threads work (`process/pace.py`), so that they keep their speed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.config.lora import NAME_LIMIT, is_name
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.lora.inject import lora_layer, lora_layers, switch_of
from qlora_kit.lora.low_rank import Part
from qlora_kit.lora.merged import Merged, merge
from qlora_kit.lora.mixed import Mixed, Stacks
from qlora_kit.lora.opening import open_adapter
from qlora_kit.lora.stack import check_weights, weighted_sum
from qlora_kit.lora.switch import Active, Adapted, Switch
from qlora_kit.process.pace import Pace


class Frozen(Adapted):
    """An adapter that does not train: tensors that nothing writes to.

    `parts` hold of each adapted linear A (r, in_features), B (out_features, r), the scaling and
    their dtype.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(weight.nbytes for part in self.parts.values() for weight in part.weights)


class AdapterBank:
    """The adapters of a base, by name, and which of them takes part.

    A model that trains an adapter of its own keeps it: `use` sets it aside, `using` puts it back.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self._adapters: dict[str, Frozen] = {}
        self._merged: dict[str, Merged] = {}
        # Replaced as a whole, so that a reader in another thread has the one or the other.
        self._switch: Switch | None = None
        self._changing, self._pace = threading.RLock(), Pace()
        self._adding, self._switching = threading.Lock(), threading.Lock()
        self._before: list[Active | None] = []
        """What `using` and a step put back, the last one first."""
        self._in_step = False
        self._stacks = Stacks(())
        """Those of the last mix, which the next may use again."""

    @property
    def most_of_rows(self) -> int:
        """Bytes that rows with different adapters may take as copies of their own."""
        return self._stacks.room.most

    @most_of_rows.setter
    def most_of_rows(self, most: int) -> None:
        self._stacks.room.most = most

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """What takes part, None for the base alone."""
        active = self._shared_switch().active
        return None if active is None else active.name

    def nbytes(self, name: str) -> int:
        """What an adapter takes: its matrices, and its copies where it is merged."""
        merged = self._merged.get(name)
        return self._get(name).nbytes + (0 if merged is None else merged.nbytes)

    def add(
        self,
        name: str,
        directory: AdapterFiles | str | os.PathLike[str],
        *,
        allow_other_base: bool = False,
    ) -> None:
        """Add the adapter in `directory` (ours or PEFT's) under a name; what is active stays so.

        Errors: `AdapterError` for a name that is taken, or where files, shapes, targets or the base
        do not fit; `UnsafeInputError`, `NumericError`. Nothing is changed then, nor where memory
        ends on the way.
        """
        self._check_new(name)
        with self._adding:
            self._pace.begin()
            if not isinstance(directory, AdapterFiles):
                directory = read_adapter(directory)
            self._pace()
            info = None if allow_other_base else self.base.info
            opened = open_adapter(self.base.model, directory, info)
            weights = opened.read(self.base.device, rest=self._pace)
            parts = {module: (weights[module], opened.scaling(module)) for module in opened.modules}
            with self._changing:
                self._check_new(name)  # another may have come meanwhile
                self._put(name, parts)

    def add_sum(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the weighted sum of adapters of the bank as one more.

        Its update of a linear is the sum of theirs, of which each is multiplied by its weight: the
        A's are stacked along the rank and the B's, scaled in fp32, beside each other, so that ranks
        add. It has the widest dtype of its parts, to which a scaled B is rounded once.
        Errors: `AdapterError` for a name that is taken or unknown, and for weights that are no
        finite numbers or all 0.
        """
        with self._changing:
            self._check_new(name)
            check_weights(weights)
            summed = [(self._get(part), float(weight)) for part, weight in weights.items()]
            by_layer: dict[nn.Module, list[tuple[Part, float]]] = {}
            for adapter, weight in summed:
                for layer, part in adapter.parts.items():
                    if weight:
                        by_layer.setdefault(layer, []).append((part, weight))
            parts = {layer: weighted_sum(terms) for layer, terms in by_layer.items()}
            self._adapters = {**self._adapters, name: Frozen(name, parts)}

    def remove(self, name: str) -> None:
        """Take an adapter out; its memory is free when nothing that computes with it is left.

        Errors: `AdapterError` for an unknown name, and for an adapter that `use` or `using` made
        active, or that is put back.
        """
        with self._changing:
            self._get(name)
            with self._switching:
                stay = [*self._before, *(() if self._in_step else (self._shared_switch().active,))]
            if any(isinstance(one, Frozen | Merged) and one.name == name for one in stay):
                raise AdapterError(
                    f"adapter {name!r} is active", "switch to another one first, or use(None)"
                )
            self._adapters = {known: one for known, one in self._adapters.items() if known != name}
            self._merged = {known: one for known, one in self._merged.items() if known != name}
            self._stacks = Stacks((), self._stacks.room)  # the last may hold the adapter

    def merge(self, name: str, bits: int | None = 16) -> Merged:
        """Let an adapter take part as copies of its linears with it in them (`merged.py`).

        They lie beside the base in `bits`, None: as the base, and are used from the next `use` or
        `rows` on; in a batch their rows are alone. Errors: as `merge`, and `AdapterError` for an
        unknown name; nothing is changed then.
        """
        with self._changing:
            merged = merge(self.base, self._get(name), bits)
            self._merged = {**self._merged, name: merged}
        return merged

    def unmerge(self, name: str) -> None:
        """Let an adapter take part beside the base again; its copies, if any, are dropped.

        Errors: `AdapterError` for an unknown name.
        """
        with self._changing, self._switching:
            adapter, merged = self._get(name), self._merged.get(name)
            self._merged = {known: one for known, one in self._merged.items() if known != name}
            if merged is not None:
                self._before = [adapter if one is merged else one for one in self._before]
                switch = self._shared_switch()
                if switch.active is merged and not self._in_step:
                    switch.active = adapter

    def use(self, name: str | None) -> None:
        """Let one adapter take part from the next forward on; None is the base alone.

        That is after the step where an engine decodes; `use` and `using` are for its thread.
        Errors: `AdapterError` for an unknown name; nothing is changed then.
        """
        active = self._taking_part(name)
        with self._switching:
            if self._in_step:
                self._before[-1] = active
            else:
                self._shared_switch().active = active

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Let one adapter take part meanwhile, and afterwards what took part before."""
        active, switch = self._taking_part(name), self._shared_switch()
        with self._switching:
            self._before.append(switch.active)
            switch.active = active
        try:
            yield
        finally:
            with self._switching:
                switch.active = self._before.pop()

    @contextlib.contextmanager
    def step(self, active: Active | None) -> Iterator[None]:
        """Inside, what an engine's step computes with takes part; afterwards what did before."""
        switch = self._shared_switch()
        with self._switching:
            self._before.append(switch.active)
            switch.active, self._in_step = active, True
        try:
            yield
        finally:
            with self._switching:
                before, self._in_step = self._before.pop(), False
                if switch.active is active:  # else it was switched past the bank
                    switch.active = before

    def rows(self, names: Sequence[str | None]) -> Active | None:
        """What takes part in a batch whose rows have these adapters, None for the base alone.

        One adapter for all rows is that adapter itself. Errors: `AdapterError` for an unknown name,
        and for a merged adapter beside others.
        """
        return self.together([self._taking_part(name) for name in names])

    def together(self, adapters: Sequence[Active | None]) -> Active | None:
        """The same for what `rows` gave one by one, whatever the bank has under its name by now.

        Errors: `AdapterError` for a merged adapter beside others.
        """
        merged = next((one for one in adapters if isinstance(one, Merged)), None)
        if merged is not None and any(one is not merged for one in adapters):
            raise AdapterError(
                f"adapter {merged.name!r} is merged, and shares no batch with other rows",
                "give it a batch of its own, or unmerge it",
            )
        found = Mixed.of(adapters, self._stacks)
        if isinstance(found, Mixed):
            self._stacks = found.stacks
            # Asked afterwards: `remove` in another thread may have been there meanwhile.
            if any(self._adapters.get(one.name) is not one for one in found.stacks.adapters):
                self._stacks = Stacks((), found.stacks.room)  # these hold what is removed
        return found

    def _taking_part(self, name: str | None) -> Frozen | Merged | None:
        """An adapter as it is used: merged where it is; None for the base alone."""
        return None if name is None else self._merged.get(name) or self._get(name)

    def _get(self, name: str) -> Frozen:
        adapters = self._adapters
        if name not in adapters:
            known = ", ".join(adapters) or "none: add one first"
            raise AdapterError(f"the bank has no adapter {name!r}", f"it has {known}")
        return adapters[name]

    def _check_new(self, name: str) -> None:
        # No module has this name, so that it may have dots: those of versions and hub ids.
        if not is_name(name):
            raise AdapterError(
                f"{repr(name)[:60]} cannot be the name of an adapter",
                f"give a text of one line, of at most {NAME_LIMIT} characters",
            )
        if name in self._adapters:
            raise AdapterError(
                f"the bank has an adapter {name!r} already", "give another name, or remove it first"
            )

    def _shared_switch(self) -> Switch:
        """The reference that the adapted linears of the model read; there are none before `add`.

        Errors: `AdapterError` where the model has other layers since (`to_peft`).
        """
        if self._switch is not None and self._switch.left:
            raise AdapterError("the base was given to PEFT since", "make a new AdapterBank of it")
        if self._switch is None and lora_layers(self.base.model):
            self._switch = switch_of(self.base.model)
        return self._switch or Switch()

    def _put(self, name: str, weights: Mapping[str, tuple[tuple[Tensor, Tensor], float]]) -> None:
        """Add what was read: nothing here takes memory of a device, or fails."""
        switch = self._shared_switch()
        parts: dict[nn.Module, Part] = {}
        for module, ((a, b), scaling) in weights.items():
            layer = lora_layer(self.base.model, module, switch)
            parts[layer] = Part(layer.base_layer, (a, b), scaling, a.dtype)
            self._pace()
        self._switch = switch
        self._adapters = {**self._adapters, name: Frozen(name, parts)}
