"""What a real run takes, counted like a planned one: by component, and by phase with its peak.

`count_step` wraps one training step and sees every tensor of it. `MemoryProfiler` wraps loading and
the few steps of a run that it is told to count; for all other steps it does nothing, so that they
are as fast as without it. A counted step computes the same bit for bit.

On CUDA the phases also have the caching allocator's own peaks, allocated and reserved: what they
are above the counted ones is rounding and workspace inside kernels. On the CPU they have the
process's resident set, imports and file pages included. Counted components never peak all at once:
their sum is above the peak.

Hooks on the model and on its layers' outputs say in which layer forward and backward are. What is
made between the last norm and the gradient that comes back to it belongs to the loss; a gradient
that has been accumulated is tagged as one. The hooks keep no tensor alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.tagged import tag_weights
from qlora_kit.data.batch import Batch
from qlora_kit.device.found import allocator_peaks, peak_bytes
from qlora_kit.device.target import has_own_memory, has_values
from qlora_kit.kernels.workspace import tagged_workspace
from qlora_kit.lora.inject import tag_adapters
from qlora_kit.memory.counter import Sizes, StorageCounter, most_of_each, optimizer_bytes
from qlora_kit.training.optimizer import tag_states


@dataclass
class Phase:
    """The most bytes of a phase at once, and the module where; what else the system says.

    `allocated` and `reserved` are the caching allocator's, `resident` the process's so far.
    """

    peak: int = 0
    module: str = ""
    allocated: int = 0
    reserved: int = 0
    resident: int = 0


class MemoryProfiler:
    """Counts loading and chosen steps of a run on `device`; costs nothing elsewhere.

    `sizes` has the most bytes of each component in the counted steps, `phases` what was at each
    phase: load, inject, forward, backward, step. `highest` is the allocator's peak before its
    statistics were reset here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open = contextlib.ExitStack()
        self._counter: StorageCounter | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self.sizes: Sizes = {}
        self.phases: dict[str, Phase] = {}
        self.highest = 0

    @property
    def peak(self) -> tuple[int, str, str]:
        """The most counted bytes at once, with their phase and module; 0 before any."""
        every = ((one.peak, phase, one.module) for phase, one in self.phases.items())
        return max(every, default=(0, "", ""))

    @contextlib.contextmanager
    def loading(self) -> Iterator[StorageCounter]:
        """Inside, a model is made; the caller says with `at` when a phase begins."""
        counter = self._counter_here()
        counter.filling = "loading"
        with counter:
            yield counter
        self._take(counter)

    def begin(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """A step that is counted begins, or begins again; `end` has to follow, whatever happens."""
        self.end()
        self._optimizer = optimizer
        self._counter = self._open.enter_context(count_step(model, optimizer, self._counter_here()))

    def before_optimizer(self) -> None:
        """The passes of the step are done."""
        if self._counter is not None:
            self._counter.at("step")
            self._counter.filling = "optimizer"

    def end(self) -> None:
        """The step is over, if one is counted."""
        counter, self._counter = self._counter, None
        if counter is None or self._optimizer is None:
            return
        tag_states(self._optimizer, counter.tag)
        self._open.close()
        self._take(counter)
        found = most_of_each(counter.intervals)
        # What came and went in the optimizer's step is in its peak, and no state.
        found |= optimizer_bytes(self._optimizer)
        for component, most in found.items():
            self.sizes[component] = max(most, self.sizes.get(component, 0))

    def record(self) -> dict[str, dict[str, Any]]:
        """The phases for JSON; what was not measured is left out."""
        return {
            name: {key: value for key, value in asdict(phase).items() if value}
            for name, phase in self.phases.items()
        }

    def _counter_here(self) -> StorageCounter:
        own = has_own_memory(self._device)
        return AllocatorCounter(self._device) if own else HostCounter()

    def _take(self, counter: StorageCounter) -> None:
        for interval in counter.intervals:
            if not interval.phase:
                continue
            phase = self.phases.setdefault(interval.phase, Phase())
            if interval.peak > phase.peak:
                phase.peak, phase.module = interval.peak, interval.module
            if isinstance(counter, AllocatorCounter):
                allocated, reserved = counter.said.get(interval.phase, (0, 0))
                phase.allocated = max(phase.allocated, allocated)
                phase.reserved = max(phase.reserved, reserved)
                self.highest = max(self.highest, allocated)
            else:
                phase.resident = peak_bytes(self._device)


class HostCounter(StorageCounter):  # type: ignore[no-untyped-call]
    """Counts what takes memory: not the tensors of a plan that is made in the middle of a step."""

    def _add(self, tensor: Tensor, component: str) -> None:
        if has_values(tensor) and not tensor.is_meta:
            super()._add(tensor, component)


class AllocatorCounter(StorageCounter):  # type: ignore[no-untyped-call]
    """Counts what is on a GPU, and asks its caching allocator in every interval.

    `said` has the most allocated and reserved bytes by phase.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.said: dict[str, tuple[int, int]] = {}

    def __exit__(self, *exception: Any) -> None:
        self._ask()
        super().__exit__(*exception)

    def at(self, phase: str, module: str = "") -> None:
        """A new interval begins."""
        self._ask()
        super().at(phase, module)

    def _ask(self) -> None:
        phase = self.intervals[-1].phase
        before, (allocated, reserved) = self.said.get(phase, (0, 0)), allocator_peaks(self._device)
        self.said[phase] = max(before[0], allocated), max(before[1], reserved)

    def _add(self, tensor: Tensor, component: str) -> None:
        # Batches come from the host, and paged states are in managed memory.
        if tensor.is_cuda or component == "paged":
            super()._add(tensor, component)


@contextlib.contextmanager
def count_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    counter: StorageCounter | None = None,
    micro_batches: Sequence[Batch] = (),
) -> Iterator[StorageCounter]:
    """Inside, the counter sees a step of `model` come and go; what is there already is tagged.

    The tensors of `micro_batches` count as activations.
    """
    counter = counter or StorageCounter()
    tag_weights(model, counter.tag)
    tag_adapters(model, counter.tag)
    tag_states(optimizer, counter.tag)
    counter.tag("activations", batch_tensors(micro_batches))
    with tagged_workspace(counter.tag), counter, follow(model, counter):
        yield counter


def batch_tensors(micro_batches: Sequence[Batch]) -> list[Tensor]:
    """The tensors of some batches."""
    return [one for batch in micro_batches for one in batch.values() if isinstance(one, Tensor)]


EMBEDDING, NORM, HEAD = "embedding", "final norm", "head and loss"
"""Modules of a step beside its layers."""


@contextlib.contextmanager
def follow(model: PreTrainedModel, counter: StorageCounter) -> Iterator[None]:
    """Inside, the counter's intervals and what is being filled follow the steps of `model`."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(decoder_layers(model))
    trained = [p for p in model.parameters() if p.requires_grad]

    def enter(phase: str, module: str, filling: str = "activations") -> None:
        counter.at(phase, module)
        counter.filling = filling

    def on_gradient(output: Any, module: str) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: enter("backward", module))  # type: ignore[no-untyped-call]

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output, names[id(layer)])
        if layer is layers[-1]:
            enter("forward", NORM)

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output.last_hidden_state, NORM)
        enter("forward", HEAD, "loss")

    def before_layer(layer: nn.Module, args: Any) -> None:
        enter("forward", names[id(layer)])

    def before_model(module: nn.Module, args: Any) -> None:
        enter("forward", EMBEDDING)

    handles = [
        model.base_model.register_forward_pre_hook(before_model),
        model.base_model.register_forward_hook(after_model),
        # First: what other hooks do belongs to the layer that they are on.
        *(layer.register_forward_pre_hook(before_layer, prepend=True) for layer in layers),
        *(layer.register_forward_hook(after_layer, prepend=True) for layer in layers),
        *(
            one.register_post_accumulate_grad_hook(
                lambda p: counter.tag("gradients", (p.grad,)) if p.grad is not None else None
            )
            for one in trained
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
