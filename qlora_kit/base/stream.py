"""A frozen base of which two decoder layers are on the device at a time.

The frozen tensors of decoder layers lie in a store (`layer_store.py`), and the device has two slots
of the largest layer's size. When a layer is about to run, its modules are given views of the slot
that it is in, and the next layer is loaded into the other slot meanwhile: forward 0, 1, 2 ... and
backward n - 1, n - 2 ... The last two layers of forward are the first two of backward, and the
other way around, so that a step of n layers loads 2n - 4. Without gradients the layer behind the
last one is the first.

A layer is asked for by hooks: before its forward, and by the gradient of its output, which comes
before anything in it is recomputed or goes backward, whatever its recompute level. No module ever
holds bytes of another layer: those of one that leaves its slot hold tensors without memory, which
nothing can read. So a pass that ended in the middle, for lack of memory or by a signal, leaves
nothing to mend: the next layer that is asked for is loaded.

Our own linears keep nothing of a weight for backward. What a model's own code keeps of a slot
(`F.linear` does) is kept as its place in the layer, and found again where the layer is then.

On CUDA a stream of its own loads: after the kernels that read what was in the slot, and before
those of the layer. Whatever takes the time of its thread, such as reads of a file, has a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.base.decoder import layers_path
from qlora_kit.base.layer_store import Places, Store, block_bytes
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.resident import Streamed
from qlora_kit.device.target import without_values
from qlora_kit.device.transfer import TO_DEVICE, Wait, copies_on, is_planned

SLOTS = 2


class LayerStream:
    """The decoder layers of `model`, whose `places` are in one of two `slots` while they run.

    It hooks itself into the layers. Slots are blocks of the device, flat uint8, as large as the
    largest layer's. `blocks` is all memory that layers lie in, that of the slots too. What modules
    hold now is what they hold at rest: tensors without memory, in a plan any of their shape.
    """

    def __init__(
        self,
        model: Any,
        places: Sequence[Places],
        store: Store,
        slots: Sequence[Tensor],
        blocks: Sequence[Tensor],
    ) -> None:
        path, device = layers_path(model), slots[0].device
        owner, _, self._leaf = path.rpartition(".")
        self._owner = model.get_submodule(owner)
        layers = list(model.get_submodule(path))
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._places, self._store, self._copies = places, store, copies_on(device)
        self._slots = [_Slot(block) for block in slots]
        self._last = self._slots[0]
        self._bytes = [block_bytes(one) for one in places]
        self._rest = [[place.tensor for place in one] for one in places]
        self._own_code = [
            any(not isinstance(place.module, QuantizedLinear) for place in one) for one in places
        ]
        self._open: list[saved_tensors_hooks] = []
        held = tuple(blocks)
        for number, layer in enumerate(layers):
            streamed = Streamed(device, partial(self.take, number), held)
            for place in places[number]:
                vars(place.module)["streamed"] = streamed
            layer.register_forward_pre_hook(partial(self._before, number))
            layer.register_forward_hook(partial(self._after, number), always_call=True)

    def take(self, number: int, then: int | None = None) -> None:
        """Have a layer in a slot, its modules' tensors there; begin to load the layer `then`.

        Errors: `ModelError`, `ResourceError` of the store.
        """
        slot = self._slot_of(number)
        if slot is None:
            idle = [one for one in self._slots if one is not self._last and one.load is None]
            slot = idle[0] if idle else self._last
            self._begin(number, slot)
        if not slot.is_read:
            self._finish(number, slot)
        self._last = slot
        if then is not None and self._slot_of(then) is None:
            self._begin(then, next(one for one in self._slots if one is not slot))

    def _slot_of(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.number == number), None)

    def _begin(self, number: int, slot: _Slot) -> None:
        """Take a slot from the layer that is in it, and begin to load another one there.

        A signal's exception may end this between any two lines, and leaves what is true.
        """
        if slot.load is not None:
            slot.load.end()
        slot.is_read = False
        if slot.number is not None:
            self._put(slot.number, self._rest[slot.number])
        slot.number = slot.load = None
        block = slot.block[: self._bytes[number]]
        if is_planned(block):
            without_values(TO_DEVICE, (block,), ())
        else:
            self._copies.follow()
            slot.load = _Load(partial(self._loaded, number, block))
            slot.load.begin(in_thread=self._store.waits)
        slot.number = number

    def _loaded(self, number: int, block: Tensor) -> Wait:
        with self._copies.inside():
            self._store.load(number, block)
            return self._copies.ended()

    def _finish(self, number: int, slot: _Slot) -> None:
        """Wait for a slot's load, and let the layer's modules have what has come."""
        if slot.load is not None:
            slot.load.end()
            if (error := slot.load.error) is not None:
                slot.number = slot.load = None
                raise error
            slot.load.arrived()
        if number not in slot.views:
            slot.views[number] = [place.of(slot.block) for place in self._places[number]]
        self._put(number, slot.views[number])
        slot.is_read, slot.load = True, None

    def _put(self, number: int, tensors: Sequence[Tensor]) -> None:
        for place, tensor in zip(self._places[number], tensors, strict=True):
            place.put(tensor)

    def _neighbour(self, number: int, by: int, *, around: bool = False) -> int | None:
        """The layer that runs next, among those that the model has now (`only_layers`)."""
        order = [self._numbers[id(layer)] for layer in getattr(self._owner, self._leaf)]
        place = order.index(number) + by
        if around:
            place %= len(order)
        return order[place] if 0 <= place < len(order) else None

    def _before(self, number: int, layer: nn.Module, args: Any) -> None:
        """Before the forward of a layer."""
        trains = torch.is_grad_enabled()
        self.take(number, self._neighbour(number, 1, around=not trains))
        if trains and self._own_code[number]:
            hooks = saved_tensors_hooks(self._kept, self._found)
            hooks.__enter__()
            self._open.append(hooks)

    def _after(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        """After it, or after it failed: its backward begins with the gradient of its output."""
        if self._open:
            self._open.pop().__exit__(None, None, None)
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(partial(self._backward, number))  # type: ignore[no-untyped-call]

    def _backward(self, number: int, gradient: Tensor) -> None:
        self.take(number, self._neighbour(number, -1))

    def _kept(self, tensor: Tensor) -> Any:
        """What is kept of a tensor for backward: itself, or its place in a layer."""
        storage = tensor.untyped_storage()._cdata
        for slot in self._slots:
            if storage == slot.storage:
                assert slot.number is not None
                view = tensor.shape, tensor.stride(), int(tensor.storage_offset())
                return _Kept(slot.number, tensor.dtype, *view)
        return tensor

    def _found(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Kept):
            return kept  # type: ignore[no-any-return]
        self.take(kept.number)
        slot = self._slot_of(kept.number)
        assert slot is not None
        return slot.block.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)


class _Slot:
    """A block of bytes of the device, and the number of the layer whose bytes it has or gets.

    `load` is on its way until the layer's modules read the slot (`is_read`).
    """

    def __init__(self, block: Tensor) -> None:
        self.block, self.storage = block, block.untyped_storage()._cdata
        self.number: int | None = None
        self.load: _Load | None = None
        self.is_read = False
        self.views: dict[int, list[Tensor]] = {}
        """The tensors of layers that were here: a pass takes them again and again."""


class _Load:
    """A load of a block, here or in a thread; `arrived` has what is computed wait for it."""

    def __init__(self, run: Callable[[], Wait]) -> None:
        self._run = run
        self._thread: threading.Thread | None = None
        self.arrived: Wait = _at_once
        self.error: BaseException | None = None

    def begin(self, *, in_thread: bool) -> None:
        """Begin to load."""
        if not in_thread:
            self._work()
            return
        # A thread for each load: it keeps no process from ending, and takes no time beside one.
        self._thread = threading.Thread(target=self._work, name="layer", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Return when nothing more is read, whether it failed or not."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            self.arrived = self._run()
        except BaseException as error:
            self.error = error


class _Kept(NamedTuple):
    """A view of a layer's block; `offset` is in elements."""

    number: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _at_once() -> None:
    """Of a load that is over when it returns."""
