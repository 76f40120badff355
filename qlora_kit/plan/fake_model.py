"""A run's model, adapters and optimizer on fake tensors, made by the run's own code.

Fake tensors have a shape and a dtype and no values: an operation says which tensors it would make,
and a counter adds them up. So nothing is read and nothing is computed. The device that the run is
meant for is data: it decides kernels, dtype and paging, while the tensors themselves are on the CPU
(`device/target.py`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.decoder import decoder_layers, layer_kind, only_layers
from qlora_kit.base.fill import fill
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.device.target import Capability, has_own_memory, planned_device
from qlora_kit.lora.inject import inject_lora, tag_adapters
from qlora_kit.memory.counter import HOST, Interval, StorageCounter
from qlora_kit.plan.fake_mode import FakeMode, as_planned
from qlora_kit.plan.repeat import RepeatedQuantize
from qlora_kit.training.optimizer import (
    gradient_like,
    make_optimizer,
    make_states,
    optimizer_names,
    tag_states,
)
from qlora_kit.training.prepare import prepare_model

IDLE = "idle"
"""What is kept for another trace."""


class FakeModel:
    """A model with adapters and its optimizer; `loading` are the intervals until they were there.

    What `counter` counts as one of `apart` is in no sum. `layers` are the decoder's, `names` their
    modules' names, `kinds` equal for layers that do the same. `fused` says whether they run through
    blocks of ours. `gradients` has a tensor for each of `trained`, like what backward leaves there.
    `optim` is the name of its optimizer, one of the `optims` that the options allow.
    `capability` is that of a card that is planned for. A base that is streamed lies in the host's
    memory, or `in_files` of the cache.

    Errors: `ConfigError` for targets or a rank that do not fit the base.
    """

    def __init__(
        self,
        base: Base,
        lora: LoRAConfig,
        training: TrainingConfig,
        device: torch.device,
        capability: Capability | None = None,
        placement: Placement = ON_DEVICE,
        in_files: bool = False,
    ) -> None:
        self.in_files = in_files
        self.device, self.context, self._capability = device, base.context, capability
        self.apart = ("paged", IDLE, HOST) if has_own_memory(device) else ("paged", IDLE)
        self.counter = StorageCounter(apart=self.apart)
        self.mode = FakeMode()
        self._workspace: dict[torch.dtype, Tensor] = {}
        with self.counted():
            self.counter.at("load")
            self.counter.filling = "loading"
            self._on_fakes(base.model)
            quantize = RepeatedQuantize(self.counter, self.apart)
            self.model: Any = fill(
                base, self._read, self.counter.tag, quantize, placement, in_files
            )
            self.counter.at("inject")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a rank, which the run says itself
                inject_lora(self.model, lora, seed=training.seed)
            tag_adapters(self.model, self.counter.tag)
            # A run, too, counts no further: its layers are then tried on a few tokens, of which no
            # step has fewer.
            self.loading = self.taken(0)
        self._training = training
        self.model.train()
        self.layers = list(decoder_layers(self.model))
        found = {id(module): name for name, module in self.model.named_modules()}
        self.names = [found[id(layer)] for layer in self.layers]
        self.place(placement)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.counted():
            self.gradients = [gradient_like(parameter) for parameter in self.trained]
            self.counter.tag(IDLE, self.gradients)
        self.optimizer: torch.optim.Optimizer | None = None
        self.optims = optimizer_names(training.optim, device)
        self.take_optimizer(self.optims[0])

    def place(self, placement: Placement) -> None:
        """Have this placement, whose weights lie where those of the one before do."""
        self.placement = placement
        with self.counted():
            note = prepare_model(self.model, self._training, "none", placement=placement)
        self.fused = self._training.fused_blocks and note is None
        self.kinds = [_kind_of(layer) for layer in self.layers]

    def take_optimizer(self, name: str) -> None:
        """Have the optimizer of that name, with the states that its first step leaves."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
        with planned_device(self.device.type, self._capability):
            self.optimizer = make_optimizer(name, self.trained, 1e-4)
        self.optim = name
        with self.counted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of paging, which a CPU has not
            self.counter.filling = "optimizer"
            make_states(self.optimizer)
            tag_states(self.optimizer, self.counter.tag)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Fake tensors, counted, for the planned device; the workspace stays between calls."""
        with (
            self.mode,
            as_planned(self.device, self._capability, self._workspace, self.counter.tag),
            self.counter,
        ):
            yield

    def taken(self, first: int) -> list[Interval]:
        """The intervals of a phase since `first`."""
        self.counter.at("")
        return [one for one in self.counter.intervals[first:-1] if one.phase]

    @contextlib.contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Let the model have these of its layers meanwhile."""
        with only_layers(self.model, chosen):
            yield

    def _read(self, entry: Any, into: Tensor) -> None:
        self.counter.tag(HOST if HOST in self.apart else "loading", (into,))

    def _on_fakes(self, model: nn.Module) -> None:
        """Replace the buffers, which the architecture computes when it is built."""
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, self.mode.from_tensor(buffer))


def _kind_of(layer: nn.Module) -> Hashable:
    """What makes a layer the same as another one: code, settings and tensors."""
    block = getattr(layer.forward, "block", None)
    return layer_kind(layer), None if block is None else block.kind
