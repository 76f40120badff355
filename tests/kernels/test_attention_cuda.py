"""Laws of attention by CUDA's fused kernels, whose operations are plain matmuls on the CPU."""

from __future__ import annotations

import pytest
import torch
from attention_laws import PACKS, WHOLE, check, drawn, results, rows_of

from qlora_kit.kernels import attention_cuda
from qlora_kit.kernels.attention_cuda import attend_packed, attention_kernel
from qlora_kit.kernels.attention_ops import ATTEND_BY_KERNEL, padded

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
T4, RTX_30, H100, RTX_50 = (7, 5), (8, 6), (9, 0), (12, 0)
LIMIT = 1e-12
"""Of double precision, in which the two sides sum in another order."""


@pytest.mark.parametrize(
    ("card", "dtype", "head_size", "kernel"),
    [
        *((card, dtype, 128, "flash") for card in (RTX_30, H100, RTX_50) for dtype in (FP16, BF16)),
        *((card, FP32, 128, "efficient") for card in (T4, RTX_30, H100)),
        (T4, FP16, 128, "efficient"),
        (T4, FP16, 256, "efficient"),
        (T4, BF16, 128, "blocks"),  # no kernel has bf16 there
        (H100, BF16, 256, "flash"),
        (H100, BF16, 512, "efficient"),  # the global heads of Gemma 4
        (RTX_30, BF16, 208, "efficient"),
        (H100, BF16, 208, "flash"),
        (H100, BF16, 100, "blocks"),
        (H100, torch.float64, 128, "blocks"),
    ],
)
def test_a_card_takes_the_kernel_that_it_has(card, dtype, head_size, kernel):
    assert attention_kernel(card, dtype, head_size) == kernel
    assert attention_kernel(card, dtype, head_size, softcap=50.0) == "blocks"


@pytest.mark.parametrize("card", [RTX_30, RTX_50])
def test_dropout_of_wide_heads_is_not_flashs_on_smaller_cards(card):
    """torch refuses their backward there: see `can_use_flash_attention` in sdp_utils.cpp."""
    assert attention_kernel(card, BF16, 256) == "flash"
    assert attention_kernel(card, BF16, 256, drops=True) == "efficient"
    assert attention_kernel(card, BF16, 128, drops=True) == "flash"
    assert attention_kernel(H100, BF16, 256, drops=True) == "flash"


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 1, 5, 22])
@pytest.mark.parametrize("lengths", [PACKS, WHOLE], ids=["packs", "rows"])
def test_output_and_gradients_are_those_under_a_mask(lengths, window, kernel):
    check(lengths, kernel, window, torch.float64, "cpu", LIMIT, width=16)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 5])
def test_rows_of_a_pack_are_what_each_is_alone(window, kernel):
    *inputs, grad = drawn(PACKS, 4, 2, 16, FP32)
    together = results(
        inputs, grad, lambda *parts: attend_packed(*parts, 0.3, kernel, rows_of(PACKS), window)
    )
    for number, lengths in enumerate(PACKS):
        end = 0
        for length in lengths:
            end += length
            place = slice(number, number + 1), slice(None), slice(end - length, end)
            alone = results(
                [x[place] for x in inputs],
                grad[place],
                lambda *parts: attend_packed(*parts, 0.3, kernel, None, window),
            )
            for ours, reference in zip(alone, together, strict=True):
                # fp32, sums of at most 22 terms in another order.
                torch.testing.assert_close(ours, reference[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("lengths", [PACKS, WHOLE, [[20, 10]]], ids=["packs", "rows", "pack"])
@pytest.mark.parametrize("spends", [False, True])
def test_backward_takes_heads_in_pieces(kernel, lengths, spends, monkeypatch):
    *inputs, grad = drawn(lengths, 12, 3, 16, torch.float64)
    rows = rows_of(lengths)

    def attended(spends):
        given = grad.clone()  # which may be written over
        return results(
            inputs, given, lambda *parts: attend_packed(*parts, 0.3, kernel, rows, None, spends)
        )

    expected = attended(False)
    # Two key heads of three at once, with four query heads each.
    monkeypatch.setattr(attention_cuda, "HEADS_AND_TOKENS", 8 * grad.shape[0] * grad.shape[2])
    for ours, reference in zip(attended(spends), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("lengths", [PACKS, WHOLE], ids=["packs", "rows"])
def test_the_operations_and_their_fakes_agree(lengths, kernel):
    query, key, value, grad = drawn(lengths, 4, 2, 16, BF16)
    rows = rows_of(lengths)
    options = rows.starts, [n for one in lengths for n in one], 0.3, kernel, 5
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ATTEND_BY_KERNEL, (query, key, value, *options), test_utils=checks)
    kept = ATTEND_BY_KERNEL(query, key, value, *options)
    backward = torch.ops.qlora_kit.attend_by_kernel_backward.default
    torch.library.opcheck(backward, (grad, query, key, value, *kept, *options), test_utils=checks)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_keys_and_values_are_kept_once_a_group(kernel):
    *inputs, _ = drawn(PACKS, 8, 2, 16, BF16)
    for x in inputs:
        x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = attend_packed(*inputs, 0.3, kernel, rows_of(PACKS))
    *tensors, sums = kept
    assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in (*inputs, output)]
    each = [n for one in PACKS for n in one]
    assert sums.numel() == 8 * sum(each if kernel == "flash" else map(padded, each))
    assert sums.dtype is FP32
