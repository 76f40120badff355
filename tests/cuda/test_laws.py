"""The laws of `device_laws.py` on a card: formats, products, steps, answers, exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import device_laws as laws
import pytest
import torch
from families import DENSE, FAMILIES, LIKE_LLAMA
from trained import write_rows

from qlora_kit.base.quantize import Quantization
from qlora_kit.lora import dropout

STEPS = [
    *((family, 4) for family in FAMILIES),
    *(("llama3", 8), ("llama3", 16), ("gemma2", 8), ("mistral", 16)),
]
bf16 = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.cuda.is_bf16_supported(False),
    reason="the card does not multiply in bf16",
)


@pytest.fixture(autouse=True)
def _products_in_fp32() -> Iterator[None]:
    """As torch has them unless it is told otherwise: TF32 would round the factors to 10 bits."""
    assert not torch.backends.cuda.matmul.allow_tf32
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", laws.DTYPES)
@pytest.mark.parametrize("shape", laws.SHAPES)
@pytest.mark.parametrize("form", laws.FORMATS)
def test_bytes_scales_and_maps_are_bitsandbytes_own(form, shape, dtype) -> None:
    laws.check_bytes(form, shape, dtype, "cuda")


def test_bytes_of_a_large_weight_are_too() -> None:
    """More values than are encoded at once, and several groups of scales."""
    for form in laws.FORMATS:
        laws.check_bytes(form, (1031, 515), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", laws.DTYPES)
@pytest.mark.parametrize("shape", [*laws.SHAPES, (300, 173), (1031, 515)])
@pytest.mark.parametrize("form", laws.FORMATS)
def test_a_dequantized_weight_is_table_times_scale_rounded_once(form, shape, dtype) -> None:
    laws.check_dequantized(form, shape, dtype, "cuda")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", laws.DTYPES)
@pytest.mark.parametrize("shape", [*laws.SHAPES, (300, 173)])
@pytest.mark.parametrize("form", [*laws.FORMATS, Quantization(16)])
def test_a_matmul_and_its_gradient_equal_double_precision(form, shape, dtype, bias) -> None:
    laws.check_products(form, shape, dtype, bias, "cuda")


@pytest.mark.parametrize(("family", "bits"), STEPS)
def test_a_step_is_that_of_the_cpu(family: str, bits: int) -> None:
    laws.check_step(family, bits, "cuda")


@pytest.mark.parametrize("family", [*DENSE, *LIKE_LLAMA])
def test_a_step_of_newer_families_is_that_of_the_cpu(family: str) -> None:
    laws.check_step(family, 4, "cuda", ("full",))


@bf16
@pytest.mark.parametrize(("family", "bits"), STEPS)
def test_a_step_in_bf16_is_as_far_from_fp32(family: str, bits: int) -> None:
    laws.check_step_in_16_bits(family, bits, torch.bfloat16, "cuda", ("none", "full"))


@pytest.mark.parametrize(("family", "bits"), STEPS[-5:])
def test_a_step_in_fp16_is_as_far_from_fp32(family: str, bits: int) -> None:
    laws.check_step_in_16_bits(family, bits, torch.float16, "cuda", ("selective",))


@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_in_tiles_is_one_without(family, dtype, monkeypatch) -> None:
    monkeypatch.setattr(dropout, "TILE_TOKENS", 16)
    laws.check_tiles(family, dtype, "cuda")


@pytest.mark.parametrize(("family", "bits"), [("llama3", 4), ("gemma2", 8), ("mistral", 16)])
def test_answers_are_those_of_the_cpu(bases: Path, family: str, bits: int) -> None:
    laws.check_answers(bases / family, bits, "cuda")


def test_an_export_is_read_back_as_there_is_room(bases: Path, tmp_path: Path) -> None:
    assert laws.check_export(bases / "deep", tmp_path, 4, "cuda") == [
        "whole, on cuda",
        "layer by layer, on cuda",
        "layer by layer, on the host",
    ]


@bf16
@pytest.mark.parametrize(("bits", "level"), [(4, "none"), (4, "selective"), (8, "full")])
def test_a_step_takes_what_is_planned(bases: Path, bits: int, level: str) -> None:
    """Tensors are counted; what kernels take inside, and the allocator's rounding, are not."""
    laws.check_planned(bases / "deep", bits, level, "cuda", within=0.03)


def test_the_way_of_the_readme(bases: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    found = laws.check_way(bases / "llama2", rows, tmp_path, "cuda")
    assert found["memory"]["device"].startswith(torch.cuda.get_device_name())
