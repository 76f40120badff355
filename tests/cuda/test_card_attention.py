"""The fused kernels of a card are plain attention: rows, windows, grouped heads."""

from __future__ import annotations

import attention_laws as laws
import pytest
import torch

from qlora_kit.kernels import attention_cuda
from qlora_kit.kernels.attention_cuda import attend_packed, attention_kernel

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Some roundings of each dtype; fp32 is multiplied in three parts of 16 bits on tensor cores."""


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("lengths", [laws.PACKS, laws.WHOLE, laws.LONG])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_cards_kernels_are_plain_attention(
    lengths: list[list[int]], window: int | None, kernel: str, dtype: torch.dtype, width: int
) -> None:
    best = attention_kernel(torch.cuda.get_device_capability(), dtype, width)
    if best == "blocks" or (kernel == "flash" and best != "flash"):
        pytest.skip(f"this card has no {kernel} attention of {dtype} and width {width}")
    laws.check(lengths, kernel, window, dtype, "cuda", LIMITS[dtype], width)


@pytest.mark.parametrize("lengths", [laws.PACKS, laws.WHOLE, laws.LONG])
@pytest.mark.parametrize("dtype", LIMITS)
def test_backward_in_pieces_of_heads_is_plain_attention(
    lengths: list[list[int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = attention_kernel(torch.cuda.get_device_capability(), dtype, 64)
    if kernel == "blocks":
        pytest.skip(f"this card has no fused attention of {dtype}")
    monkeypatch.setattr(attention_cuda, "HEADS_AND_TOKENS", 1)
    laws.check(lengths, kernel, None, dtype, "cuda", LIMITS[dtype], 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grouped_heads_take_no_scores_of_all_pairs(dtype: torch.dtype) -> None:
    """32 heads and 8 key heads at 2,048 tokens: one matrix of scores has 537 MB in fp32."""
    *inputs, grad = (x.to("cuda") for x in laws.drawn([[2048]], 32, 8, 128, torch.float32))
    inputs = [x.to(dtype) for x in inputs]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    laws.results(
        inputs, grad.to(dtype), lambda *parts: attend_packed(*parts, laws.SCALE, "efficient")
    )
    assert torch.cuda.max_memory_allocated() - before < 134_000_000 * dtype.itemsize
