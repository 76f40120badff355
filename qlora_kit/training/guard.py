"""Keeps a bad step and a full device from harming a run.

`Guard` wraps each step. `run_backward` runs its forward and backward passes; where the device is
full it drops the gradients, has more recomputed or halves the micro-batches, and tries again: the
same step, because levels of recompute change no number and a step is weighted by tokens.
`before_step` looks at the loss and the gradient norm before the optimizer does: a step that is not
finite is skipped, and the third in a row raises.

A signal's `Stopped` comes out of `run_backward` as well: the step is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.data.batch import Batch, rows_together, split
from qlora_kit.device.found import empty_cache, free_bytes
from qlora_kit.errors import NumericError, ResourceError
from qlora_kit.process.out_of_memory import is_out_of_memory, missing_bytes
from qlora_kit.process.signals import StopSignals
from qlora_kit.training.host_gradients import come_back, drop_gradient
from qlora_kit.training.layer_forward import models_own_code
from qlora_kit.training.loss import supervised_loss, to_device
from qlora_kit.training.loss_scale import LossScale

SKIP_LIMIT = 3
"""A run stops at this many non-finite steps in a row."""


class Guard:
    """What a step passes between its micro-batches and the optimizer.

    `note` takes lines for the user, `rows_of` says which rows of the data a step has.
    `recompute_more` is called with what an allocation fell short by, where that is known, and
    returns the bytes then planned, or None where nothing is left to recompute. Parameters and
    optimizer state are as before a step that is skipped, dropped or raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        signals: StopSignals | None = None,
        note: Callable[[str], None] = lambda line: None,
        rows_of: Callable[[int], str] = lambda step: "unknown",
        recompute_more: Callable[[int | None], int | None] = lambda missing: None,
    ) -> None:
        self._model, self._note, self._rows_of = model, note, rows_of
        self._recompute_more = recompute_more
        self._device = model.device
        self._signals = signals or StopSignals()
        self._checked_gradients = False
        self._micro_batches: Sequence[Batch] = ()
        self.loss_scale = LossScale.of(model, note)
        """Of an fp16 run; `train` lowers it where gradients overflow, and takes the step again."""
        self.bad_in_a_row = 0
        """Skipped steps since the last one that was taken."""
        self.max_rows: int | None = None
        """Rows of a micro-batch that the device was found to hold; None: as configured."""
        self.planned_bytes: int | None = None
        """What the run takes at most by its plan, where there is one; said in an error."""

    def run_backward(
        self, backward: Callable[[Sequence[Batch]], Tensor], micro_batches: Sequence[Batch]
    ) -> Tensor:
        """`backward(micro_batches)`, with less at once where the device is full.

        Errors: `ResourceError` where one row does not fit, `Stopped`.
        """
        while True:
            if self.max_rows is None:
                self._micro_batches = micro_batches
            else:
                parts = (split(batch, self.max_rows) for batch in micro_batches)
                self._micro_batches = list(itertools.chain.from_iterable(parts))
            try:
                with self._signals.droppable():
                    means = backward(_Stoppable(self._micro_batches, self._signals))
                    come_back(self._model.parameters())  # these need memory of the device, too
                    return means
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                missing = missing_bytes(str(error))
            # Here, not above: the exception held the frames, and they the activations.
            self.drop_gradients()
            empty_cache()
            planned = self._recompute_more(missing)
            if planned is None:
                self._halve(missing)
            else:
                self.planned_bytes = planned

    def drop_gradients(self) -> None:
        """Forget what a part of a step has accumulated."""
        for parameter in self._model.parameters():
            drop_gradient(parameter)

    def before_step(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may take this step.

        Errors: `NumericError` at the third non-finite step in a row, and where no gradient reaches
        an adapter in the first step.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_in_a_row = 0
            if not self._checked_gradients:
                self._checked_gradients = True
                self._refuse_dead_adapters()
            return True
        problem = (
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}, "
            f"first not finite in {self._first_non_finite(step)}, rows {self._rows_of(step)}"
        )
        if self.bad_in_a_row + 1 == SKIP_LIMIT:
            raise NumericError(
                f"{problem} ({SKIP_LIMIT} such steps in a row)",
                "lower --learning_rate, or use --dtype bf16 or fp32; no weight was changed by them",
            )
        self.bad_in_a_row += 1
        self._note(f"{problem}: skipped")
        return False

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps of it."""
        own = {"bad_in_a_row": self.bad_in_a_row, "max_rows": self.max_rows}
        return {**own, **self.loss_scale.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as `state` says. Errors: `KeyError`, `TypeError`, `ValueError` for any other."""
        bad_in_a_row, max_rows = state["bad_in_a_row"], state["max_rows"]
        if type(bad_in_a_row) is not int or not 0 <= bad_in_a_row < SKIP_LIMIT:
            raise ValueError(f"bad_in_a_row {bad_in_a_row!r}")
        if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
            raise ValueError(f"max_rows {max_rows!r}")
        self.loss_scale.restore(state)
        self.bad_in_a_row, self.max_rows = bad_in_a_row, max_rows

    def _first_non_finite(self, step: int) -> str:
        """As the function; no memory to look is no reason to end a run, whose step is skipped."""
        try:
            return first_non_finite(self._model, self._micro_batches, step)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return "a module that there was no memory to look for"

    def _halve(self, missing: int | None) -> None:
        largest = max(batch["input_ids"].shape[0] for batch in self._micro_batches)
        length = max(batch["input_ids"].shape[1] for batch in self._micro_batches)
        least = max(map(rows_together, self._micro_batches))
        if largest <= least:
            needed = "an unknown size" if missing is None else f"{missing} bytes"
            free, planned = free_bytes(self._device), ""
            if self.planned_bytes is not None:
                planned = f"{self.planned_bytes} bytes planned, "
            one = "row" if least == 1 else "pair of rows"
            raise ResourceError(
                f"out of memory with one {one} of {length} tokens: {planned}"
                f"{needed} more needed, {free} bytes free",
                f"lower --max_length below {length}, use --gradient_checkpointing full, "
                "or --bits 4",
            )
        self.max_rows = -(-largest // least // 2) * least
        self._note(
            f"out of memory with {largest} rows at a time: going on with {self.max_rows} and twice "
            "the accumulation, which is the same step"
        )

    def _refuse_dead_adapters(self) -> None:
        """Every lora_B gets a gradient in the first step, unless it is cut off from the loss."""
        dead = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
            and ".lora_B." in name
            and (parameter.grad is None or not parameter.grad.any())
        ]
        if dead:
            raise NumericError(
                f"no gradient reaches {len(dead)} adapters ({dead[0]} ...)",
                "choose other --target_modules; these layers take no part in the loss",
            )


class _Stoppable(Sequence[Batch]):
    """Micro-batches between which a signal may end the step."""

    def __init__(self, micro_batches: Sequence[Batch], signals: StopSignals) -> None:
        self._micro_batches, self._signals = micro_batches, signals

    def __getitem__(self, index: Any) -> Any:
        return self._micro_batches[index]

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._micro_batches:
            self._signals.between_micro_batches()
            yield batch


def first_non_finite(model: PreTrainedModel, micro_batches: Sequence[Batch], step: int) -> str:
    """The innermost module whose output is the first that is not finite, found by running again.

    Where the forward pass is finite, the parameter whose gradient is not.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not torch.isfinite(first).all():
                found.append(name)

        return look

    hooks = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad(), models_own_code():
            for micro_step, batch in enumerate(micro_batches):
                for module in model.modules():
                    if hasattr(module, "seek"):
                        module.seek(step, micro_step)
                loss = supervised_loss(model, to_device(batch, model.device))
                if found or not torch.isfinite(loss):
                    return found[0] if found else "the loss"
    finally:
        for one in hooks:
            one.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return "the sum of the gradients"
