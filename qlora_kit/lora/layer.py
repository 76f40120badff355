"""LoRALinear: a frozen linear in 16, 8 or 4 bits with a trained low-rank update.

    y = W x + b + scaling * B (A dropout(x))

One autograd function computes both parts. The low-rank part comes first, so that recomputation
can stop before the base product is made again, and the update is added into the base product in
place. For backward it keeps x and A x, nothing of W. `lora_A` and `lora_B` are fp32 masters; the
copies that compute are in the adapter dtype and are made where they are used.

Module and parameter names are PEFT's: `base_layer`, `lora_A.<adapter>.weight` (r, in_features),
`lora_B.<adapter>.weight` (out_features, r).
Source: Hu et al., LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.base.quantize import product, product_grad


class KeyedDropout(nn.Module):
    """Dropout whose mask follows from seed, layer, step and micro-step alone.

    Recomputing a layer, or a step that is tried again, draws the same mask without any saved
    random state. The training loop calls `seek` on whatever has it.
    """

    def __init__(self, p: float, seed: int, layer_name: str) -> None:
        super().__init__()
        self.p = p
        self._key = f"{seed} {layer_name}"
        self._position = (0, 0)

    def seek(self, step: int, micro_step: int) -> None:
        """Say where the run stands; masks drawn from here on belong to that place."""
        self._position = (step, micro_step)

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of `x` and scale up the rest; the identity in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        step, micro_step = self._position
        digest = hashlib.sha256(f"{self._key} {step} {micro_step}".encode()).digest()
        generator = torch.Generator(device=x.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p, generator=generator)
        return x * keep * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"p={self.p}"


class LoRALinear(nn.Module):
    """A linear with adapters by name, of which one or none is active."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.adapter_dtypes: dict[str, torch.dtype] = {}
        self.active: str | None = None
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def add_adapter(
        self, name: str, r: int, scaling: float, dtype: torch.dtype, dropout: KeyedDropout
    ) -> None:
        """Add fp32 masters on the base layer's device: A drawn, B zero, so that nothing changes.

        A is drawn from the global generator as PEFT draws it (Kaiming uniform, a = sqrt(5)).
        """
        device = self.base_layer.weight.device
        down = nn.Linear(self.in_features, r, bias=False, device="cpu", dtype=torch.float32)
        up = nn.Linear(r, self.out_features, bias=False, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.lora_A[name], self.lora_B[name] = down.to(device), up.to(device)
        self.lora_dropout[name] = dropout
        self.scaling[name], self.adapter_dtypes[name] = scaling, dtype
        self.active = name

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter; the base alone is left active if it was the active one."""
        for held in (self.lora_A, self.lora_B, self.lora_dropout, self.scaling):
            del held[name]
        del self.adapter_dtypes[name]
        if self.active == name:
            self.active = None

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The masters A (r, in_features) and B (out_features, r) of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) to (..., out_features) in the dtype of `x`."""
        name = self.active
        if name is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        dropped = self.lora_dropout[name](x)
        return _LoRAProduct.apply(  # type: ignore[no-any-return, no-untyped-call]
            x,
            None if dropped is x else dropped,
            *self.weights(name),
            self.base_layer,
            self.scaling[name],
            self.adapter_dtypes[name],
        )


def delta_weight(layer: LoRALinear, name: str) -> Tensor:
    """The dense update `scaling * B @ A` in fp32, (out_features, in_features).

    It is computed from what training multiplied by: A and B rounded to the adapter dtype.
    """
    lora_a, lora_b = layer.weights(name)
    dtype = layer.adapter_dtypes[name]
    a, b = (w.detach().to(dtype).float() for w in (lora_a, lora_b))
    return (b @ a).mul_(layer.scaling[name])


class _LoRAProduct(torch.autograd.Function):
    """`W x + b + scaling * B A x` as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        base_layer: nn.Linear,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        low = x if dropped is None else dropped
        hidden = F.linear(low.to(dtype), lora_a.to(dtype))
        y = product(base_layer, x)
        _add_product(y, hidden, lora_b.to(dtype).t(), scaling)
        ctx.save_for_backward(low, hidden, lora_a, lora_b)
        ctx.base_layer, ctx.scaling, ctx.dtype = base_layer, scaling, dtype
        ctx.own_low = dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low, hidden, lora_a, lora_b = ctx.saved_tensors
        dtype = ctx.dtype
        grad = grads[0].to(dtype)
        # (..., out) to (N, out): the products below sum over every token.
        rows = grad.reshape(-1, grad.shape[-1])
        grad_hidden = (grad @ lora_b.to(dtype)).mul_(ctx.scaling)
        grad_b = rows.t().mm(hidden.reshape(rows.shape[0], -1)).to(lora_b.dtype).mul_(ctx.scaling)
        flat = grad_hidden.reshape(rows.shape[0], -1)
        grad_a = flat.t().mm(low.reshape(rows.shape[0], -1).to(dtype)).to(lora_a.dtype)
        grad_x = grad_low = None
        if ctx.needs_input_grad[0]:
            grad_x = product_grad(ctx.base_layer, grads[0])
            if not ctx.own_low:
                _add_product(grad_x, grad_hidden, lora_a.to(dtype), 1.0)
        if ctx.own_low and ctx.needs_input_grad[1]:
            grad_low = (grad_hidden @ lora_a.to(dtype)).to(low.dtype)
        return grad_x, grad_low, grad_a, grad_b, None, None, None


def _add_product(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """`y += alpha * left @ right` in place; `y` (..., n), `left` (..., r), `right` (r, n)."""
    rows = y.view(-1, y.shape[-1])
    left = left.reshape(rows.shape[0], -1)
    if left.dtype == y.dtype:
        rows.addmm_(left, right, alpha=alpha)
    else:
        rows.add_(left @ right, alpha=alpha)
