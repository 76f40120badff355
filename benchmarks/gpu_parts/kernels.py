"""Quantized linears on the device: bytes, numbers, products and gradients against references.

Bytes must equal bitsandbytes' own, and numbers the table's entry times the scale. Products and
gradients are compared with double precision; of each combination the relative error of the norm is
kept, and those above the bound of their dtype are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from gpu_parts.setting import Setting
from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.base.linear import Linear4bit, dequantize, frozen_linear, quantize_linear
from qlora_kit.base.quantize import Quantization, code_tables, decoding

SHAPES = ((64, 64), (173, 64), (64, 173), (96, 160), (33, 7), (256, 1024))
ROWS, FEW = 7, 2
"""Few rows are multiplied as decoding does it: by packed weights where a kernel can."""
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""fp32 sums in another order; one rounding of the result and one of each operand in 16 bits."""
FORMATS = (
    *(Quantization(4, kind, double) for kind in ("nf4", "fp4") for double in (True, False)),
    Quantization(8),
    Quantization(16),
)


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Every format, dtype and shape; with a bias in every second one."""
    wrong: list[str] = []
    worst: dict[str, float] = {}
    count = 0
    for quantization, dtype, shape in itertools.product(FORMATS, BOUNDS, SHAPES):
        name = f"{_name(quantization)}, {str(dtype).removeprefix('torch.')}, {shape[0]}x{shape[1]}"
        count += 1
        for what, error, bound in _errors(setting, quantization, dtype, shape, bias=count % 2 == 0):
            key = f"{what}, {str(dtype).removeprefix('torch.')}"
            worst[key] = max(worst.get(key, 0.0), error)
            if not error <= bound:
                wrong.append(f"{what}: {name}: {error:g}")
    found |= {"combinations": count, "worst": worst, "wrong": wrong}
    return f"{count} combinations, {len(wrong)} wrong{f' ({wrong[0]})' if wrong else ''}"


def _errors(
    setting: Setting,
    quantization: Quantization,
    dtype: torch.dtype,
    shape: tuple[int, int],
    bias: bool,
) -> Iterator[tuple[str, float, float]]:
    """What is compared, its error and the largest that is right."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(setting.device, dtype)

    weight, x, grad = drawn(*shape), drawn(ROWS, shape[1]), drawn(ROWS, shape[0])
    added = drawn(shape[0]) if bias else None
    if quantization.bits == 16:
        layer = nn.Linear(shape[1], shape[0], bias=bias, device=setting.device, dtype=dtype)
        layer.weight.data.copy_(weight)
        if added is not None:
            layer.bias.data.copy_(added)
        layer.requires_grad_(False)
    else:
        held = None if added is None else nn.Parameter(added, requires_grad=False)
        layer = quantize_linear(weight, held, quantization)
    if isinstance(layer, Linear4bit):
        yield "bytes", *_other_bytes(layer, weight, quantization)
        yield "numbers", *_other_numbers(layer)
    # In 4 bits what is multiplied by is rounded to the dtype; in 8 bits the scale is apart.
    exact = dequantize(layer, dtype if quantization.bits == 4 else torch.float64).double()
    x.requires_grad_(True)
    y = frozen_linear(layer, x)
    y.backward(grad)
    reference = x.detach().double() @ exact.T
    if added is not None:
        reference += added.double()
    yield "product", _relative(y, reference), BOUNDS[dtype]
    with torch.no_grad(), decoding():
        few = frozen_linear(layer, x[:FEW])
    yield "product in decoding", _relative(few, reference[:FEW]), BOUNDS[dtype]
    assert x.grad is not None
    yield "gradient", _relative(x.grad, grad.double() @ exact), BOUNDS[dtype]


def _other_bytes(
    layer: Linear4bit, weight: Tensor, quantization: Quantization
) -> tuple[float, float]:
    """How many bytes differ from bitsandbytes' own."""
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=BLOCKSIZE,
        quant_type=quantization.quant_type,
        compress_statistics=quantization.double_quant,
    )
    different = (packed.view(-1) != layer.weight.view(-1)).sum()
    different += (state.absmax.view(-1) != layer.absmax.view(-1)).sum()
    return float(different), 0.0


def _other_numbers(layer: Linear4bit) -> tuple[float, float]:
    """How many numbers are not the table's entry times the scale."""
    packed = layer.weight.view(-1).long()
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)
    codes = codes[: layer.in_features * layer.out_features]
    table = code_tables(layer.quant_type)[0].to(codes.device)
    scales = layer.scales().repeat_interleave(BLOCKSIZE)[: codes.numel()]
    numbers = (table[codes] * scales).view(layer.out_features, layer.in_features)
    return float((numbers != layer.dequantize(torch.float32)).sum()), 0.0


def _relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.detach().double() - reference).norm() / reference.norm())


def _name(quantization: Quantization) -> str:
    if quantization.bits != 4:
        return f"{quantization.bits} bits"
    return f"{quantization.quant_type}{', double' if quantization.double_quant else ''}"
