"""The Triton kernels against torch's operations for the same, as a list of errors and limits.

    TRITON_INTERPRET=1 python tests/support/kernel_parity.py

prints them as JSON, computed by Triton's interpreter, which needs no card; `parity("cuda")` is for
a card. The interpreter truncates to bf16 where a card rounds: there every rounding may be a step
away. It calls the launches through the operations of `qlora_kit`, as the package does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from adapted import adapted_model
from families import token_ids
from torch import Tensor

from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.kernels import triton_ops
from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.kernels.rotary import rotate
from qlora_kit.kernels.swiglu import ACTIVATIONS, Gate
from qlora_kit.lora import low_rank

OPS = torch.ops.qlora_kit
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 63, 64, 65, 1000)
SUMS = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of sums in another order and of other exponentials: a step, relative to the largest number."""
TRUNCATED = 2**-6
"""Of numbers in bf16 that are truncated twice on their way."""


class Case(NamedTuple):
    kernel: str
    case: str
    error: float
    limit: float


class Drawn:
    """Random numbers on a device, the same ones everywhere."""

    def __init__(self, device: str) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype).to(self._device)


def error(found: Tensor, expected: Tensor, of: Tensor | None = None) -> float:
    """The largest difference, relative to the largest number of what is expected, or `of`."""
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max()
    largest = (expected if of is None else of).double().abs().max()
    return float(difference / largest.clamp(min=1e-30))


def parity(device: str) -> Iterator[Case]:
    """All kernels, all dtypes that they take, on shapes that fill no last block."""
    truncates = device == "cpu"
    triton_ops.allow_triton(False)  # what they are compared with is torch
    try:
        for dtype in DTYPES:
            exact = TRUNCATED if truncates and dtype is torch.bfloat16 else 0.0
            sums = TRUNCATED if exact else SUMS[dtype]
            yield from dequantized(Drawn(device), dtype, exact)
            yield from normalized(Drawn(device), dtype, sums)
            yield from rotated(Drawn(device), dtype, exact)
            yield from gated(Drawn(device), dtype, sums)
    finally:
        triton_ops.allow_triton(True)


def dequantized(drawn: Drawn, dtype: torch.dtype, limit: float) -> Iterator[Case]:
    """Equal numbers: the table entry times the scale, rounded once."""
    forms = [("nf4", True, (63, 64)), ("nf4", False, (1, 64)), ("fp4", True, (7, 4672))]
    for quant_type, double, shape in forms:
        weight = drawn(*shape, dtype=dtype)
        layer: Any = quantize_linear(weight, None, Quantization(4, quant_type, double))
        expected = layer.dequantize(dtype).view(-1)
        out = torch.empty_like(expected)
        nested = layer.nested_absmax, layer.nested_map, layer.nested_offset
        packed = layer.weight.detach().view(-1)
        OPS.triton_dequantize.out(packed, layer.absmax, *nested, quant_type, out=out)
        off = error(out, expected)
        if not limit:
            # But for the sign of zero: FP4 has both, and bitsandbytes' AVX2 code gives one of them.
            off = float(not torch.equal(out, expected))
        yield Case("dequantize", f"{quant_type} {double} {shape} {dtype}", off, limit)


def norms(weight: Tensor) -> list[FrozenNorm]:
    """One of each style, in the kernels' order."""
    return [
        FrozenNorm(None, 1e-6, False),
        FrozenNorm(weight, 1e-6, False),
        FrozenNorm(weight, 1e-6, False, True),
        FrozenNorm(weight, 1e-6, True),
    ]


def normalized(drawn: Drawn, dtype: torch.dtype, limit: float) -> Iterator[Case]:
    for n in WIDTHS:
        rows = 2 if n == 1000 else 17  # more than a program has, and fewer
        x, y, grad, residual = (drawn(rows, n, dtype=dtype) for _ in range(4))
        weight = drawn(n, dtype=dtype)
        for style, norm in enumerate(norms(weight)):
            if style != (WIDTHS.index(n) + DTYPES.index(dtype)) % 4:
                continue  # each style with some widths in some dtypes
            label = f"style {style} {rows} x {n} {dtype}"
            expected, scale = norm.by_torch(x)
            found, scales = torch.empty_like(x), torch.empty_like(scale)
            OPS.triton_normalize.out(
                x, None, norm.weight, 1e-6, style, summed=None, y=found, scale=scales
            )
            yield Case("normalize", label, error(found, expected), limit)
            yield Case("normalize", f"scale {label}", error(scales, scale), 2e-6)
            found = torch.empty_like(x)
            OPS.triton_normalize_again.out(x, scale, norm.weight, style, y=found)
            yield Case("normalize", f"again {label}", error(found, expected), limit)
            summed, found = torch.empty_like(x), torch.empty_like(x)
            OPS.triton_normalize.out(
                x, y, norm.weight, 1e-6, style, summed=summed, y=found, scale=scales
            )
            yield Case("add", label, error(summed, x + y), limit)
            # Of the sum that was rounded, whichever way that went.
            yield Case("add", f"normalized {label}", error(found, norm.by_torch(summed)[0]), limit)
            for more in (None, residual):
                (expected,) = norm.backward(grad, x, kept=scale, residual=more)
                found = torch.empty_like(x)
                OPS.triton_normalize_backward.out(
                    grad, x, scale, norm.weight, style, more, out=found
                )
                # What goes along the tokens is taken off: of one number nothing is left.
                off = error(found, expected, of=torch.cat((expected, grad * scale)))
                yield Case("normalize_backward", label, off, limit)


def rotated(drawn: Drawn, dtype: torch.dtype, exact: float) -> Iterator[Case]:
    """Bit for bit: both do the same operations, rounded at the same places."""
    shapes = [(2, 2, 5, 1, 16, 16), (1, 3, 3, 2, 24, 12), (1, 1, 20, 2, 160, 160)]
    for rows, length, heads, kv_heads, d, width in shapes:
        for angles in (dtype, torch.float32)[: 2 if d == 16 else 1]:
            # Attention's gradients come with heads before tokens.
            q = drawn(rows, heads, length, d, dtype=dtype).transpose(1, 2)
            k = drawn(rows, length, kv_heads, d, dtype=dtype)
            angle = drawn(1, length, width // 2, dtype=torch.float32).repeat(1, 1, 2)
            cos, sin = angle.cos().to(angles), angle.sin().to(angles)
            for neighbours in (False, True):
                for back in (False, True) if d == 16 else (neighbours,):
                    label = f"{tuple(q.shape)} {width} {neighbours} {back} {angles} {dtype}"
                    outs = torch.empty(q.shape, dtype=dtype, device=q.device), torch.empty_like(k)
                    OPS.triton_rotate.out(
                        q, k, cos, sin, neighbours, back, q_out=outs[0], k_out=outs[1]
                    )
                    for x, found in zip((q, k), outs, strict=True):
                        expected = turned(x, cos, sin, neighbours, back)
                        yield Case("rotate", label, error(found, expected), exact)


def turned(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, back: bool) -> Tensor:
    """By torch: forward, or the gradient of it."""
    if not back:
        return rotate(x, cos, sin, neighbours)
    leaf = torch.zeros_like(x).requires_grad_()
    return torch.autograd.grad(rotate(leaf, cos, sin, neighbours), leaf, x)[0]


def gated(drawn: Drawn, dtype: torch.dtype, limit: float) -> Iterator[Case]:
    for activation in ACTIVATIONS:
        gate = Gate(activation)
        for f in (1, 65, 1025):
            label = f"{activation} {f} {dtype}"
            # Both side by side, as one projection gives them: rows are not contiguous.
            both = 3 * drawn(2, 2 * f, dtype=dtype)
            x, up = both.chunk(2, dim=-1)
            out, grad = torch.empty(2, f, dtype=dtype, device=x.device), drawn(2, f, dtype=dtype)
            OPS.triton_gate.out(x, up, activation, out=out)
            yield Case("gate", label, error(out, gate.recompute(both)), limit)
            by_both, by_up = torch.empty_like(both), torch.empty_like(grad)
            halves = dict(zip(("grad_gate", "grad_up"), by_both.chunk(2, dim=-1), strict=True))
            OPS.triton_gate_backward.out(grad, x, up, activation, **halves)
            (expected,) = gate.backward(grad.clone(), both)
            yield Case("gate_backward", label, error(by_both, expected), limit)
            # The gradient by gate in place of the one that came.
            OPS.triton_gate_backward.out(grad, x, up, activation, grad_gate=grad, grad_up=by_up)
            found = torch.cat((grad, by_up), dim=-1)
            yield Case("gate_backward", f"in place {label}", error(found, by_both), 0.0)


def step(family: str) -> Iterator[Case]:
    """A whole forward and backward on the CPU as a card has it, kernels interpreted."""
    model: Any = adapted_model(family, bits=4, targets="all-linear").train()
    ids, positions = token_ids(1, 3), torch.arange(3)[None]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def passed() -> list[Tensor]:
        hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), [*trained.values()])]

    expected = passed()
    known = triton_ops.capability, low_rank.device_type
    triton_ops.capability, low_rank.device_type = lambda x: (8, 6), lambda x: "cuda"
    try:
        found = passed()
    finally:
        triton_ops.capability, low_rank.device_type = known
    for name, ours, theirs in zip(("output", *trained), found, expected, strict=True):
        yield Case("step", f"{family} {name}", error(ours, theirs), 1e-5)


def check_operations(device: str) -> None:
    """Each operation writes what its schema says, and its fake makes nothing else."""
    drawn = Drawn(device)

    def made(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    x, weight, scale = (drawn(*s, dtype=torch.float32) for s in ((2, 64), (64,), (2, 1)))
    heads, angles = x.view(1, 2, 4, 16), drawn(1, 2, 16, dtype=torch.float32)
    codes = torch.zeros(32, dtype=torch.uint8, device=device)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "triton_dequantize": ((codes, made(1), None, None, None, "nf4"), {"out": made(64)}),
        "triton_normalize": (
            (x, x, weight, 1e-6, 1),
            {"summed": made(2, 64), "y": made(2, 64), "scale": made(2, 1)},
        ),
        "triton_normalize_again": ((x, scale, weight, 1), {"y": made(2, 64)}),
        "triton_normalize_backward": ((x, x, scale, weight, 1, None), {"out": made(2, 64)}),
        "triton_rotate": (
            (heads, heads, angles, angles, False, False),
            {"q_out": made(1, 2, 4, 16), "k_out": made(1, 2, 4, 16)},
        ),
        "triton_gate": ((x, x, "silu"), {"out": made(2, 64)}),
        "triton_gate_backward": (
            (x, x, x, "silu"),
            {"grad_gate": made(2, 64), "grad_up": made(2, 64)},
        ),
    }
    assert calls.keys() == triton_ops.SCHEMAS.keys()
    for name, (given, written) in calls.items():
        torch.library.opcheck(
            getattr(OPS, name).out, given, written, test_utils=("test_schema", "test_faketensor")
        )


if __name__ == "__main__":
    check_operations("cpu")
    cases = [*parity("cpu"), *step("llama3")]
    json.dump([case._asdict() for case in cases], sys.stdout)
