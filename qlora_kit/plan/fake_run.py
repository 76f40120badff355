"""A run's model, adapters and optimizer on fake tensors: loaded and stepped by the run's own code.

Nothing is read and nothing is computed; each operation only says which tensors it would make, and
a counter adds them up. The device that the run is meant for is data: it decides kernels, dtype and
paging, while the tensors themselves are on the CPU (`device.py`).

What a step holds before it begins is that of any step but the first: the optimizer has its states.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.base.base import Base
from qlora_kit.base.load import fill
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, padded
from qlora_kit.device import has_own_memory, planned_device
from qlora_kit.errors import ConfigError
from qlora_kit.kernels.workspace import own_workspace, tagged_workspace
from qlora_kit.lora.inject import inject_lora, tag_adapters
from qlora_kit.memory.counter import Interval, Sizes, StorageCounter
from qlora_kit.memory.phases import follow
from qlora_kit.memory.profiler import batch_tensors
from qlora_kit.plan.extrapolate import cut, extend
from qlora_kit.plan.repeat import RepeatedQuantize
from qlora_kit.training.attention import known_rows
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import Backward, train_step
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.optimizer import (
    make_optimizer,
    make_states,
    optimizer_name,
    tag_states,
)
from qlora_kit.training.prepare import prepare_model

MOST_TOKENS = 2**52
"""Of a step; beyond some number of them sizes overflow 64 bits."""
HOST, IDLE = "host", "idle"
"""What lies in the host's memory where the device has its own; what is kept for another trace."""


class FakeRun:
    """A model with adapters and its optimizer; `loading` are the intervals until they were there.

    `updates` is that of the optimizer's step. `packed` says whether the next
    micro-batches hold packs, `longest_row` how long the longest row of a pack is.

    Errors of the constructor: `ConfigError` for targets or a rank that do not fit the base.
    """

    def __init__(
        self,
        base: Base,
        lora: LoRAConfig,
        training: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.device, self.packed = device, False
        self.longest_row: int | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.apart = ("paged", IDLE, HOST) if has_own_memory(device) else ("paged", IDLE)
        self._counter = StorageCounter(apart=self.apart)
        self._workspace: dict[torch.dtype, Tensor] = {}
        with self._inside():
            self._counter.at("load")
            self._counter.filling = "loading"
            self._on_fakes(base.model)
            quantize = RepeatedQuantize(self._counter, self.apart)
            self.model = fill(base, self._read, self._counter.tag, quantize)
            self._counter.at("inject")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a rank, which the run says itself
                inject_lora(self.model, lora, seed=training.seed)
            tag_adapters(self.model, self._counter.tag)
            self.note = prepare_model(self.model, training, "none")
        self.loading = self._taken(0)
        self.context = base.context
        self.layers = list(self.model.base_model.layers)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.train()
        with planned_device(device.type):
            name = optimizer_name(training.optim, device)
            self._optimizer = make_optimizer(name, self._trained, 1e-4)
        with self._inside():
            self._gradients = [torch.empty_like(parameter) for parameter in self._trained]
            self._counter.tag(IDLE, self._gradients)
        self.updates = self._update()
        self.own = training.fused_blocks and self.note is None
        found = {id(module): name for name, module in self.model.named_modules()}
        self.names = [found[id(layer)] for layer in self.layers]
        self._kinds = [self._kind_of(layer) for layer in self.layers]
        # The workspace that the CPU keeps: any step but the first finds it, and a forward pass
        # takes all of it.
        (batch,) = self.micro_batches(1, 2, 1, 1)
        with self._only(cut(self._kinds)), self._inside(), torch.no_grad():
            supervised_loss(self.model, batch)

    def micro_batches(
        self, rows: int, length: int, supervised: int, micro_steps: int
    ) -> list[Batch]:
        """Micro-batches of `rows` rows of `length` tokens, the last `supervised` trained on.

        The last one is what a step gets; those before it, where there are any, lie in one. So it
        takes as long for many as for few. Errors: `ConfigError` for more than any machine holds.
        """
        if rows * length * micro_steps > MOST_TOKENS:
            raise ConfigError(
                f"{micro_steps} micro-batches of {rows} x {length} tokens are more than "
                f"{MOST_TOKENS} tokens a step",
                "lower --batch_size, --gradient_accumulation_steps or --max_length",
            )
        # What a row begins with is predicted by nothing.
        shape, count = (rows, padded(length)), rows * min(supervised, length - 1)

        def made(times: tuple[int, ...]) -> Batch:
            def ids(*shape: int) -> Tensor:
                return torch.empty(*times, *shape, dtype=torch.int64)

            return Batch(
                input_ids=ids(*shape),
                labels=ids(*shape),
                position_ids=ids(*shape),
                supervised=ids(count),
                num_supervised=count,
                lengths=[],  # a step does not read them
            )

        with self._mode:
            waiting = [made((micro_steps - 1,))] if micro_steps > 1 else []
            return [*waiting, made(())]

    def passes(self, micro_batches: Sequence[Batch], levels: Sequence[str]) -> list[Interval]:
        """The intervals of forward and backward of a step; `levels` has one for each layer."""
        chosen = cut(list(zip(self._kinds, levels, strict=True)))
        return extend(self.trace(micro_batches, chosen, levels), chosen, self.names, self.apart)

    def total(self, sizes: Sizes) -> int:
        """Their sum, what lies apart left out."""
        return sum(size for name, size in sizes.items() if name not in self.apart)

    def trace(
        self, micro_batches: Sequence[Batch], chosen: Sequence[int], levels: Sequence[str]
    ) -> list[Interval]:
        """As `passes`, through the `chosen` layers only; the other layers are there, untouched.

        Only the last micro-batch is traced: it finds the gradients of those before it.
        """

        def passes(backward: Backward, last: Sequence[Batch]) -> Tensor:
            if len(micro_batches) > 1:
                self._take_gradients()
            loss = backward(last)
            self._counter.at("")
            # The norm of all gradients is no part of the passes (see `_update`); that of one has to
            # be, for what scales fp16 gradients takes no empty list.
            for parameter in self._trained[1:]:
                parameter.grad = None
            return loss

        with self._only(chosen), self._inside():
            # On a GPU there is a copy of one batch, the others wait on the host.
            waiting = micro_batches[:-1] if HOST in self.apart else []
            self._counter.tag(HOST, batch_tensors(waiting))
            self._counter.tag("activations", batch_tensors(micro_batches[len(waiting) :]))
            set_recompute(self.model, [levels[i] for i in chosen])
            first = len(self._counter.intervals)
            self._counter.filling = "activations"
            with follow(self.model, self._counter):
                self._step(micro_batches[-1:], passes, update=False)
            return self._taken(first)

    def _update(self) -> list[Interval]:
        """The interval of clipping and of the optimizer's step, with states and all gradients."""

        def given(backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
            self._take_gradients()
            loss = torch.zeros(())  # what the passes leave
            self._counter.at("step")
            return loss

        with self._inside(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of paging, which a CPU has not
            self._counter.filling = "optimizer"
            make_states(self._optimizer)
            tag_states(self._optimizer, self._counter.tag)
            first = len(self._counter.intervals)
            self._counter.at("")
            self._step([], given, update=True)
            taken = self._taken(first)
        return [one for one in taken if one.phase == "step"]

    def _take_gradients(self) -> None:
        """All gradients are there, as the micro-batches before have left them.

        Parameters that are not traced are not handed theirs: nobody asks for them.
        """
        self._counter.tag("gradients", self._gradients)
        traced = set(self.model.parameters())
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            if parameter in traced:
                parameter.grad = gradient

    def _step(self, micro_batches: Sequence[Batch], run_backward: Any, *, update: bool) -> None:
        train_step(
            self.model,
            micro_batches,
            self._optimizer,
            step=1,
            max_grad_norm=1.0,
            run_backward=run_backward,
            before_step=lambda step, loss, norm: update,
        )
        self._counter.tag(IDLE, self._gradients)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Fake tensors, counted, for the planned device; the workspace stays between calls."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(planned_device(self.device.type))
            stack.enter_context(known_rows(self.packed, self.longest_row))
            stack.enter_context(own_workspace(self._workspace))
            stack.enter_context(tagged_workspace(self._counter.tag))
            stack.enter_context(self._counter)
            yield

    def _taken(self, first: int) -> list[Interval]:
        """The intervals since `first`; they are forgotten here."""
        self._counter.at("")
        taken = self._counter.intervals[first:-1]
        return [one for one in taken if one.phase]

    def _kind_of(self, layer: nn.Module) -> Hashable:
        """What makes a layer the same as another one: code, settings and tensors."""
        attention = getattr(layer, "self_attn", None)
        named = itertools.chain(layer.named_parameters(), layer.named_buffers())
        tensors = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in named)
        return type(layer), getattr(attention, "sliding_window", None), tensors

    def _read(self, entry: TensorEntry, into: Tensor) -> None:
        self._counter.tag(HOST if has_own_memory(self.device) else "loading", (into,))

    def _on_fakes(self, model: nn.Module) -> None:
        """Replace the buffers, which the architecture computes when it is built."""
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, self._mode.from_tensor(buffer))

    @contextlib.contextmanager
    def _only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Let the model have these of its layers meanwhile."""
        body, config = self.model.base_model, self.model.config
        kinds = getattr(config, "layer_types", None)
        before = (body.layers, config.num_hidden_layers)
        try:
            body.layers = nn.ModuleList(self.layers[i] for i in chosen)
            config.num_hidden_layers = len(chosen)
            if kinds is not None:
                config.layer_types = [kinds[i] for i in chosen]
            yield
        finally:
            body.layers, config.num_hidden_layers = before
            if kinds is not None:
                config.layer_types = kinds
