"""Laws of attention of one query a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.kernels import attention_step
from qlora_kit.kernels.attention_step import attend_one, is_step

SHAPES = [(3, 4, 4, 9, 16, 16), (2, 8, 2, 40, 16, 8), (1, 6, 1, 33, 8, 8)]
"""Rows, heads, heads of keys, tokens, their widths, those of values."""


def drawn(shape, dtype):
    rows, heads, kv_heads, tokens, width, of_values = shape
    torch.manual_seed(tokens)
    query = torch.randn(rows, 1, heads, width).to(dtype).transpose(1, 2)  # as models have it
    sizes = (width, of_values)
    return query, *(torch.randn(rows, kv_heads, tokens, one).to(dtype) for one in sizes)


def mask_of(kind, rows, tokens):
    if kind == "none":
        return None
    hidden = torch.zeros(rows, 1, 1, tokens, dtype=torch.bool)
    hidden[::2, ..., :3] = True
    if kind == "bool":
        return hidden.logical_not()
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.bfloat16).min)


@pytest.mark.parametrize("copied", [1, 2**24])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_attention_rounded_once(shape, copied, monkeypatch):
    """Whatever the mask, and however few heads are computed at once."""
    monkeypatch.setattr(attention_step, "COPIED", copied)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = drawn(shape, dtype)
        assert is_step(q, k, v)
        for kind in ("none", "bool", "added"):
            mask = mask_of(kind, shape[0], shape[3])
            exact_mask = mask.double() if kind == "added" else mask
            one = (q.double(), k.double(), v.double(), exact_mask)
            exact = F.scaled_dot_product_attention(*one, scale=0.3, enable_gqa=True)
            found = attend_one(q, k, v, mask, 0.3)
            assert found.dtype is dtype
            assert found.shape == (shape[0], 1, shape[1], shape[5])
            # Half a step of the last place, and what fp32 sums are off.
            error = (found.double() - exact.transpose(1, 2)).abs()
            assert bool(
                (error <= torch.finfo(dtype).eps / 2 * exact.transpose(1, 2).abs() + 1e-6).all()
            )


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it():
    q, k, v = drawn((5, 8, 2, 70, 16, 16), torch.bfloat16)
    mask = mask_of("bool", 5, 70)
    together = attend_one(q, k, v, mask, 0.25)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(attend_one(q[one], k[one], v[one], mask[one], 0.25), together[one])


def test_others_are_left_to_the_library():
    q, k, v = drawn(SHAPES[0], torch.bfloat16)
    assert not is_step(q, k, v)  # a graph would be made
    with torch.no_grad():
        assert not is_step(q.float(), k.float(), v.float())
        assert not is_step(torch.cat((q, q), dim=2), k, v)
        assert not is_step(*(one.to("meta") for one in (q, k, v)))
