"""What backward replays layers from, on the host between their forward and their replay.

At `full` that is a layer's input, at `selective` also the middle residual and what attention gave
(`training/recompute.py`): without it a token and a layer more take 2h bytes of the device, or
4h + 2a. All are sent out when they are there, while their layer goes on computing, and come back in
the opposite order: where a replay begins, what the replay after it begins with is asked for, which
then has the time of a layer's backward to arrive. So the device holds two of them, and the very
last, which backward begins with: that one stays.

How a replay gets its input: torch's checkpoint saves it as any node of the graph saves a tensor,
and hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) put its copy on the host in
its place. Nothing else of a layer's forward holds the tensor, for all that is computed from it is
computed again. The copies live as long as the graph does: where a step is given up they go with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.device.transfer import Copies, Held, Transfers

Kept = Tensor | Held


class Offload:
    """Replays of one model whose beginnings lie on the host; `copies` as `Transfers` takes them."""

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies = copies
        self._transfers: dict[torch.device, Transfers] = {}
        self._latest: weakref.ref[Replay] | None = None

    def transfers(self, device: torch.device) -> Transfers:
        """Those of a device."""
        if device not in self._transfers:
            self._transfers[device] = Transfers(device, self._copies)
        return self._transfers[device]

    def replay(self, *, first: bool, last: bool) -> Replay:
        """The next of a forward pass; backward ends with the `first` and begins with the `last`."""
        before = None if first or self._latest is None else self._latest()
        replay = Replay(self, before, stays=last)
        self._latest = weakref.ref(replay)
        return replay


@dataclass(frozen=True)
class LayerOffload:
    """A layer's part in an `Offload`: is it the first or the last of those that recompute."""

    offload: Offload
    first: bool
    last: bool


def replay_of(layer: LayerOffload | None, *, begins: bool = True, ends: bool = True) -> Replay:
    """The next replay of a layer: the one that its backward ends or `begins` with, or both."""
    if layer is None:
        return Replay()
    return layer.offload.replay(first=layer.first and ends, last=layer.last and begins)


class Replay:
    """What one replay begins with; without an `offload` it all stays on the device."""

    def __init__(
        self, offload: Offload | None = None, before: Replay | None = None, stays: bool = True
    ) -> None:
        self._offload, self._stays = offload, stays
        self._before = None if before is None else weakref.ref(before)
        self._held: list[Held] = []

    def through(self, checkpoint: Callable[..., Any], hidden: Tensor | None) -> Callable[..., Any]:
        """`checkpoint`, torch's, with the input `hidden` (B, T, h) sent to the host."""
        if (offload := self._offload) is None or hidden is None:
            return checkpoint
        # The graph keeps the hooks: they must not hold the tensor.
        chosen = weakref.ref(hidden)

        def pack(tensor: Tensor) -> Kept:
            # Others are keys and values of another layer, which it holds itself.
            return self.keep(tensor) if tensor is chosen() else tensor

        def moved(*args: Any, **options: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, self.back):
                results = checkpoint(*args, **options)
            # All has left the device before the next layer begins, which had a layer's time.
            for device in {held.device for held in self._held}:
                offload.transfers(device).settle()
            return results

        return moved

    def keep(self, tensor: Tensor) -> Kept:
        """What to keep in place of a tensor, for `back`."""
        if self._offload is None or self._stays:
            return tensor.detach()
        self._held.append(self._offload.transfers(tensor.device).out(tensor))
        return self._held[-1]

    def back(self, kept: Kept) -> Tensor:
        """What was kept, on the device; the replay begins, and the next one's copies do."""
        self._prefetch()
        tensor = kept
        if isinstance(kept, Held):
            assert self._offload is not None
            tensor = self._offload.transfers(kept.device).back(kept)
            self._held = [one for one in self._held if one is not kept]
        if self._before is not None and (before := self._before()) is not None:
            before._prefetch()
        assert isinstance(tensor, Tensor)
        return tensor

    def _prefetch(self) -> None:
        for held in self._held:
            assert self._offload is not None
            self._offload.transfers(held.device).prefetch(held)
