"""A decoding step's product with a packed weight, on a CPU that has bitsandbytes' kernel for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import save_checkpoint

from qlora_kit.base import packed_matmul
from qlora_kit.base.linear import Linear4bit, base_matmul, quantize_linear
from qlora_kit.base.load import load_base
from qlora_kit.base.packed_matmul import MOST_TOKENS, SPARE, Copies, copying_into
from qlora_kit.base.quantize import Quantization
from qlora_kit.device.found import with_room
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request

needs_kernel = pytest.mark.skipif(
    not packed_matmul._is_right(), reason="this processor has no kernel for packed weights"
)
TOLERANCE = 4e-3
"""Half a step of bf16, for the weights or for their scales, and half a step for the sum."""


def linear(shape: tuple[int, int], quant_type: str = "nf4", double_quant: bool = True) -> Any:
    torch.manual_seed(sum(shape))
    weight, bias = torch.randn(shape).bfloat16() / 30, torch.randn(shape[0]).bfloat16()
    return quantize_linear(weight, bias, Quantization(4, quant_type, double_quant))


@needs_kernel
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 64), (96, 320), (320, 192)])
def test_it_is_as_exact_as_the_decoded_weight_and_a_row_is_its_own(
    shape: tuple[int, int], quant_type: str, double_quant: bool
) -> None:
    layer, copies = linear(shape, quant_type, double_quant), Copies()
    x = torch.randn(MOST_TOKENS, 1, shape[1]).bfloat16()
    exact = x.float() @ layer.dequantize(torch.float32).t() + layer.bias.float()
    with torch.no_grad(), copying_into(copies):
        found = base_matmul(layer, x)
        assert (found.shape, found.dtype) == (exact.shape, torch.bfloat16)
        assert float((found - exact).norm() / exact.norm()) < TOLERANCE
        for rows in (1, 5):
            assert torch.equal(base_matmul(layer, x[7 : 7 + rows]), found[7 : 7 + rows])
        column_first = x[:8, 0].t().contiguous().t()
        assert torch.equal(base_matmul(layer, column_first), found[:8, 0])
    assert list(copies) == [layer]
    del layer
    assert len(copies) == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens"),
    [
        ((64, 128), torch.float32, 1),
        ((64, 128), torch.float16, 1),
        ((64, 128), torch.bfloat16, MOST_TOKENS + 1),
        ((64, 96), torch.bfloat16, 1),
        ((48, 128), torch.bfloat16, 1),
    ],
)
def test_what_the_kernel_does_not_do_is_decoded(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> None:
    layer, copies = linear(shape), Copies()
    layer.bias.data = layer.bias.to(dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    with torch.no_grad():
        expected = base_matmul(layer, x)
        with copying_into(copies):
            assert torch.equal(base_matmul(layer, x), expected)
    assert len(copies) == 0


@needs_kernel
def test_where_memory_is_short_no_copy_is_made() -> None:
    layer, copies = linear((64, 128)), Copies()
    x = torch.randn(1, 128).bfloat16()
    with torch.no_grad(), copying_into(copies):
        with with_room(SPARE):
            base_matmul(layer, x)
        assert len(copies) == 0
        base_matmul(layer, x)
        assert list(copies) == [layer]


@needs_kernel
def test_an_engine_makes_copies_for_its_steps_and_not_of_a_model_in_training(tmp_path: Any) -> None:
    save_checkpoint(tmp_path, hidden_size=64, intermediate_size=192, head_dim=16)
    model = load_base(str(tmp_path), bits=4, dtype="bf16", device="cpu").model
    linears = {one for one in model.modules() if isinstance(one, Linear4bit)}
    engine = Engine(model, pad_id=0)
    ticket = engine.add(Request([5, 6, 7], 3))
    engine.step()
    assert engine._copies is not None
    assert len(engine._copies) == 0
    while not engine.idle:
        engine.step()
    assert set(engine._copies) == linears
    assert engine.copied_bytes() == sum(one.nbytes for one in engine._copies.values()) > 0
    engine.copy_nothing()
    assert engine.copied_bytes() == 0
    assert len(ticket.tokens) == 3
    model.get_input_embeddings().weight.requires_grad_(True)
    assert Engine(model, pad_id=0)._copies is None
