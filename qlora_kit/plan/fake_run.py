"""A run's step on fake tensors: traced through a few layers, as long as all of them.

A trace is the run's own `train_step` on a `FakeModel`, cut into the intervals of a counter: one for
each layer and phase. What a step holds before it begins is that of any step but the first: the
optimizer has its states. Clipping and the optimizer's step come after all passes and are the same
whatever the batch, so they are traced once, with all gradients there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.config.training import Placement
from qlora_kit.data.batch import PAIR, Batch, padded
from qlora_kit.errors import ConfigError
from qlora_kit.memory.counter import HOST, Interval, Sizes
from qlora_kit.memory.profiler import batch_tensors, follow
from qlora_kit.plan.extrapolate import cut, extend, layers_of, moved
from qlora_kit.plan.fake_model import IDLE, FakeModel
from qlora_kit.plan.work import noted_work
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import Backward, train_step
from qlora_kit.training.loss import SUPERVISED_TOKENS, Objective

MOST_TOKENS = 2**52
"""Of a step; beyond some number of them sizes overflow 64 bits."""


class FakeRun:
    """Steps of a fake model; `updates` are the intervals of clipping and of the optimizer's step.

    `packed` says whether the next micro-batches hold packs, `longest_row` how long the longest row
    of a pack is.
    """

    def __init__(self, fake: FakeModel, objective: Objective = SUPERVISED_TOKENS) -> None:
        self._fake, self._counter, self._objective = fake, fake.counter, objective
        self.packed = False
        self.longest_row: int | None = None
        self.context, self.loading, self.fused = fake.context, fake.loading, fake.fused
        self.layers, self.names, self.apart = fake.layers, fake.names, fake.apart
        self.device, self.in_files = fake.device, fake.in_files
        self.optims = fake.optims
        self.updates = self._update()
        # The workspace that the CPU keeps: any step but the first finds it, and a forward pass
        # takes all of it.
        (batch,) = self.micro_batches(1, 2, 1, 1)
        with fake.only(layers_of(cut(fake.kinds))), fake.counted(), torch.no_grad():
            objective.sums(fake.model, batch)

    @property
    def placement(self) -> Placement:
        """Where its tensors lie."""
        return self._fake.placement

    @property
    def optim(self) -> str:
        """The name of the optimizer that its steps have."""
        return self._fake.optim

    def place(self, placement: Placement) -> None:
        """Step with this placement from now on; weights stay where they are."""
        if placement != self._fake.placement:
            self._fake.place(placement)

    def take_optimizer(self, name: str) -> None:
        """Step with the optimizer of that name from now on."""
        if name != self.optim:
            self._fake.take_optimizer(name)
            self.updates = self._update()

    def updates_after(self, passed: Sizes) -> list[Interval]:
        """`updates` where the passes leave the sizes `passed`, and all gradients are there."""
        if self._wait_for(False):
            passed = {**passed, "gradients": self.updates[0].start.get("gradients", 0)}
        return [moved(one, "", passed, self.apart) for one in self.updates]

    def micro_batches(
        self, rows: int, length: int, supervised: int, micro_steps: int
    ) -> list[Batch]:
        """Micro-batches of `rows` rows of `length` tokens, the last `supervised` trained on.

        Or of as many pairs, where that is what a step learns from.
        The last one is what a step gets; those before it, where there are any, lie in one. So it
        takes as long for many as for few. Errors: `ConfigError` for more than any machine holds.
        """
        if rows * length * micro_steps > MOST_TOKENS:
            raise ConfigError(
                f"{micro_steps} micro-batches of {rows} x {length} tokens are more than "
                f"{MOST_TOKENS} tokens a step",
                "lower --batch_size, --gradient_accumulation_steps or --max_length",
            )
        rows *= PAIR if self._objective.pairs else 1
        # What a row begins with is predicted by nothing.
        shape, count = (rows, padded(length)), rows * min(supervised, length - 1)
        row_lengths = self._row_lengths(padded(length))

        def made(times: tuple[int, ...]) -> Batch:
            def ids(*shape: int) -> Tensor:
                return torch.empty(*times, *shape, dtype=torch.int64)

            batch = Batch(
                input_ids=ids(*shape),
                labels=ids(*shape),
                position_ids=ids(*shape),
                supervised=ids(count),
                num_supervised=count,
                lengths=[],  # a step does not read them
                packed=self.packed,
                row_lengths=[row_lengths],
                row_starts=torch.empty(*times, rows * len(row_lengths) + 1, dtype=torch.int32),
            )
            if self._objective.pairs:
                batch["reference"] = torch.empty(*times, rows)
                batch["answered"] = [count // rows] * rows
            return batch

        with self._fake.mode:
            waiting = [made((micro_steps - 1,))] if micro_steps > 1 else []
            return [*waiting, made(())]

    def _row_lengths(self, width: int) -> list[int]:
        """Those of one sequence, which stands for all: of packs the longest row, and the rest.

        Attention takes no more for a pack that is divided into more rows.
        """
        if not self.packed or width < 2:
            return [width]
        longest = min(self.longest_row or width, width - 1)
        return [longest, width - longest]

    def passes(self, micro_batches: Sequence[Batch], levels: Sequence[str]) -> list[Interval]:
        """The intervals of forward and backward of a step; `levels` has one for each layer."""
        parts = cut(list(zip(self._fake.kinds, levels, strict=True)))
        traced = self.trace(micro_batches, layers_of(parts), levels)
        return extend(traced, parts, self.names, self.apart)

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
                self._find_gradients()
            loss = backward(last)
            self._counter.at("")
            # The norm of all gradients is no part of the passes (see `_update`); that of one has to
            # be, for what scales fp16 gradients takes no empty list.
            for parameter in self._fake.trained[1:]:
                parameter.grad = None
            self._wait_for(False)
            return loss

        with self._fake.only(chosen), self._fake.counted(), noted_work(self._counter):
            # On a GPU there is a copy of one batch, the others wait on the host.
            waiting = micro_batches[:-1] if HOST in self.apart else []
            self._counter.tag(HOST, batch_tensors(waiting))
            self._counter.tag("activations", batch_tensors(micro_batches[len(waiting) :]))
            set_recompute(self._fake.model, [levels[i] for i in chosen])
            first = len(self._counter.intervals)
            self._counter.filling = "activations"
            with follow(self._fake.model, self._counter):
                self._step(micro_batches[-1:], passes, update=False)
            return self._fake.taken(first)

    def _update(self) -> list[Interval]:
        """The interval of clipping and of the optimizer's step, with states and all gradients."""

        def passed(backward: Backward, micro_batches: Sequence[Batch]) -> Tensor:
            self._take_gradients()
            loss = torch.zeros(())  # what the passes leave
            self._counter.at("step")
            return loss

        with self._fake.counted(), noted_work(self._counter), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of paging, which a CPU has not
            self._counter.filling = "optimizer"
            self._counter.at("")
            first = len(self._counter.intervals)
            self._step([], passed, update=True)
            return self._fake.taken(first)

    def _find_gradients(self) -> None:
        """As `_take_gradients`, unless they wait on the host."""
        if not self._wait_for(True):
            self._take_gradients()

    def _wait_for(self, is_there: bool) -> bool:
        """Say of the gradients that wait on the host whether they are there; False if none do."""
        every = [getattr(one, "waiting", None) for one in self._fake.model.parameters()]
        for one in filter(None, every):
            one.is_there = is_there
        return any(every)

    def _take_gradients(self) -> None:
        """All gradients are there, as the micro-batches before have left them.

        Parameters that are not traced are not handed theirs: nobody asks for them.
        """
        self._counter.tag("gradients", self._fake.gradients)
        traced = set(self._fake.model.parameters())
        for parameter, gradient in zip(self._fake.trained, self._fake.gradients, strict=True):
            if parameter in traced:
                parameter.grad = gradient

    def _step(self, micro_batches: Sequence[Batch], run_backward: Any, *, update: bool) -> None:
        assert self._fake.optimizer is not None
        train_step(
            self._fake.model,
            micro_batches,
            self._fake.optimizer,
            step=1,
            max_grad_norm=1.0,
            run_backward=run_backward,
            before_step=lambda step, loss, norm: update,
            objective=self._objective,
        )
        self._counter.tag(IDLE, self._fake.gradients)
