"""The factor of an fp16 loss before backward, lowered where gradients overflow with it.

fp16 holds 6e-8 to 65504. Gradients of a mean loss are small, so that without a factor the smallest
are zeros, and with too large a factor the largest are infinite. The factor is a power of two, which
multiplies and divides exactly, and is taken out of the gradients before they are clipped: as long
as nothing is lost at either end it changes no number.

A step whose loss is finite and whose gradients are not is taken again with half the factor. The
step is the same one, with its rows, its dropout and its place in the schedule; nothing is skipped,
where torch's `GradScaler` drops the step. After 2,000 good steps the factor is doubled, as there.
Where gradients are not finite at the smallest factor either, it is not the factor's fault: it is
put back, and the step is a bad one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qlora_kit.base.placed_embedding import computed_in

FIRST, LEAST, MOST = 2.0**10, 1.0, 2.0**16
"""Where a run begins, and between which bounds it goes."""
GOOD_STEPS = 2000
"""In a row, after which the factor is doubled."""


class LossScale:
    """The factor `value` of a run in `dtype`; 1 unless that is fp16, and then it stays so.

    `note` takes a line for the user where it is lowered.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        note: Callable[[str], None] = lambda line: None,
        *,
        first: float = FIRST,
        most: float = MOST,
    ) -> None:
        self.is_dynamic = dtype is torch.float16
        self.value = first if self.is_dynamic else 1.0
        self.good_steps = 0
        """Since the factor was changed last."""
        self._note, self._most, self._before = note, most, self.value

    @staticmethod
    def of(model: Any, note: Callable[[str], None] = lambda line: None) -> LossScale:
        """That of a run of `model`, by the dtype that it computes in."""
        return LossScale(computed_in(model), note)

    def overflowed(self, step: int, loss: float) -> bool:
        """Whether a step of this loss with gradients that are not finite is worth another try.

        The factor is then half of what it was; without one it is what the step began with.
        """
        if self.value > LEAST:
            self._note(
                f"step {step}: loss {loss:g}, gradients overflow fp16 at a loss scale of "
                f"{self.value:g}: the step is taken again at {self.value / 2:g}"
            )
            self.value, self.good_steps = self.value / 2, 0
            return True
        self.value = self._before
        return False

    def took_step(self) -> None:
        """A step is good."""
        if not self.is_dynamic:
            return
        self.good_steps += 1
        if self.good_steps == GOOD_STEPS and self.value < self._most:
            self.value *= 2
        self.good_steps %= GOOD_STEPS
        self._before = self.value

    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps of it; nothing where the factor is fixed."""
        if not self.is_dynamic:
            return {}
        return {"loss_scale": self.value, "good_steps": self.good_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as `state` says, where it says anything: older checkpoints do not.

        Errors: `KeyError`, `ValueError` for what no run has.
        """
        if not self.is_dynamic or "loss_scale" not in state:
            return
        value, good_steps = state["loss_scale"], state["good_steps"]
        powers = [LEAST * 2**power for power in range(17)]
        if type(value) not in (int, float) or value not in powers:
            raise ValueError(f"loss_scale {value!r}")
        if type(good_steps) is not int or not 0 <= good_steps < GOOD_STEPS:
            raise ValueError(f"good_steps {good_steps!r}")
        self.value = self._before = float(value)
        self.good_steps = good_steps
