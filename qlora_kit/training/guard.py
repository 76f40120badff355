"""Stops a run that does not train: non-finite steps, and adapters that no gradient reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qlora_kit.errors import NumericError


class Guard:
    """Looks at every step between backward and the optimizer, once.

    A call raises `NumericError`, or returns and the step is taken. Parameters and optimizer state
    are as before the step when it raises.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checked_gradients = False

    def __call__(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Refuse a loss or a gradient norm that is not finite; at the first call, dead adapters."""
        # One transfer for both: this is the only place of a step that waits for the device.
        loss_value, norm_value = torch.stack((loss, grad_norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NumericError(
                f"step {step}: loss {loss_value:g}, gradient norm {norm_value:g}",
                "lower --learning_rate, or use --dtype bf16 or fp32; no weight was changed by it",
            )
        if not self._checked_gradients:
            self._checked_gradients = True
            self._refuse_dead_adapters()

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
