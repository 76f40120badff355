"""Laws of attention on the CPU: exact gradients, nothing across rows or from later positions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.device.target import planned_device
from qlora_kit.kernels import attention
from qlora_kit.kernels import attention_blocks as blocks
from qlora_kit.kernels.attention import ATTEND_IN_BLOCKS, Segment, causal_attention
from qlora_kit.kernels.attention_blocks import forward_space

BF16 = torch.bfloat16
SHAPES = [
    (1, 4, 4, 300, 16),
    (2, 8, 2, 40, 64),
    (1, 6, 2, 130, 96),
    (3, 2, 1, 1, 16),
    (16, 9, 3, 128, 16),
    (32, 16, 4, 128, 16),
]
"""Batch, heads, key heads, length, width: on both sides of the width that takes our backward.

Of the last two the scores of all heads are more than are held at once, forward and then both ways.
"""
LIMIT = 1e-2
"""Twice the library's own distance from double precision in bf16 (5e-3 on these shapes)."""


@pytest.fixture(autouse=True, params=[True, False], ids=["tiles", "no_tiles"])
def processor(request, monkeypatch):
    """Both ways, whatever the processor."""
    monkeypatch.setattr(attention, "TILES", request.param)


def drawn(batch, heads, kv_heads, length, width, dtype):
    generator = torch.Generator().manual_seed(batch + length)
    return [
        torch.randn(batch, length, count, width, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def exact(query, key, value, grad, scale, segments, window=None, softcap=None):
    """Output and gradients in double precision from a mask of all pairs."""
    inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    length = query.shape[2]
    mask = torch.zeros(query.shape[0], 1, length, length, dtype=torch.bool)
    for segment in segments:
        size = segment.end - segment.start
        own = torch.ones(size, size, dtype=torch.bool).tril().triu(1 - (window or size))
        mask[segment.batch, :, segment.start : segment.end, segment.start : segment.end] = own
    if softcap is None:
        output = F.scaled_dot_product_attention(
            *inputs, attn_mask=mask, scale=scale, enable_gqa=True
        )
    else:
        q, *heads = inputs
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in heads)
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
        output = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return output, *torch.autograd.grad(output, inputs, grad.double())


def close(found, expected):
    return all(
        (a.double() - b).norm() <= LIMIT * b.norm() + 1e-6
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_near_double_precision(shape, dtype):
    *inputs, grad = drawn(*shape, dtype)
    for x in inputs:
        x.requires_grad_()
    segments = [Segment(slice(None), 0, shape[3])]
    output = causal_attention(*inputs, 0.3, segments)
    found = (output, *torch.autograd.grad(output, inputs, grad))
    assert all(a.dtype is dtype for a in found)
    assert close(found, exact(*inputs, grad, 0.3, segments))


def test_gradients_of_wide_heads_stay_exact_where_scores_are_large():
    """Scores around 8: the figure is twice the library's distance, as above."""
    *inputs, grad = drawn(1, 4, 2, 200, 128, torch.bfloat16)
    inputs[0] = inputs[0] * 8
    for x in inputs:
        x.requires_grad_()
    segments = [Segment(slice(None), 0, 200)]
    output = causal_attention(*inputs, 128**-0.5, segments)
    found = (output, *torch.autograd.grad(output, inputs, grad))
    assert close(found, exact(*inputs, grad, 128**-0.5, segments))


@pytest.mark.parametrize(
    ("window", "softcap"), [(40, None), (None, 2.0), (40, 2.0), (1, None), (200, 2.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("planned", ["cpu", "cuda"])
def test_windows_and_soft_caps_are_near_double_precision(
    window, softcap, dtype, packed, planned, monkeypatch
):
    """Both sizes of blocks: those of the CPU, and those that CUDA takes."""
    if planned == "cuda":
        limits = blocks.CUDA_QUERIES, blocks.CUDA_SCORES
        monkeypatch.setattr(blocks, "block_limits", lambda x, backward: limits)
        monkeypatch.setattr(attention, "block_limits", lambda x, backward: limits)
    *inputs, grad = drawn(2, 4, 2, 300, 80, dtype)
    for x in inputs:
        x.requires_grad_()
    segments = [Segment(slice(None), 0, 300)]
    if packed:
        places = [(0, 0, 130), (0, 130, 300), (1, 0, 299), (1, 299, 300)]
        segments = [Segment(slice(n, n + 1), start, end) for n, start, end in places]
    output = causal_attention(*inputs, 0.3, segments, window, softcap)
    found = (output, *torch.autograd.grad(output, inputs, grad))
    expected = exact(*inputs, grad, 0.3, segments, window, softcap)
    limit = LIMIT if dtype is torch.bfloat16 else 1e-5
    for ours, reference in zip(found, expected, strict=True):
        assert (ours.double() - reference).norm() <= limit * reference.norm() + 1e-6


def test_what_is_held_grows_with_the_length_and_not_with_its_square():
    """Of the largest tensor of a step, on fake tensors that CUDA would have."""

    def largest(length):
        with FakeTensorMode(), planned_device("cuda"), Largest() as seen:
            inputs = [x.detach().requires_grad_() for x in drawn(1, 8, 4, length, 64, BF16)[:3]]
            segments = [Segment(slice(None), 0, length)]
            causal_attention(*inputs, 0.3, segments, 4096, 50.0).sum().backward()
        return seen.numel

    assert largest(2**17) <= 2.1 * largest(2**16)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return found


@pytest.mark.parametrize("width", [32, 80])
def test_rows_of_a_pack_are_what_each_is_alone(width):
    *inputs, grad = drawn(2, 4, 2, 30, width, torch.bfloat16)
    for x in inputs:
        x.requires_grad_()
    ends = [[0, 7, 8, 30], [0, 30]]
    segments = [
        Segment(slice(number, number + 1), start, end)
        for number, borders in enumerate(ends)
        for start, end in itertools.pairwise(borders)
    ]
    output = causal_attention(*inputs, 0.2, segments)
    found = (output, *torch.autograd.grad(output, inputs, grad))
    assert close(found, exact(*inputs, grad, 0.2, segments))
    for segment in segments:
        alone = [segment.of(x).detach().requires_grad_() for x in inputs]
        whole = [Segment(slice(None), 0, segment.end - segment.start)]
        part = causal_attention(*alone, 0.2, whole)
        assert torch.equal(part, segment.of(output))
        for mine, theirs in zip(
            torch.autograd.grad(part, alone, segment.of(grad)), found[1:], strict=True
        ):
            assert torch.equal(mine, segment.of(theirs))


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_operation_and_its_fake_agree(shape):
    query, key, value, _ = drawn(*shape, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    space = forward_space(query, key, [(shape[0], shape[3])])
    torch.library.opcheck(
        ATTEND_IN_BLOCKS, (query, key, value, space, 0.3, None, None), test_utils=checks
    )


def test_keys_are_kept_once_a_group():
    *inputs, _ = drawn(1, 8, 2, 64, 32, torch.bfloat16)
    for x in inputs:
        x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        causal_attention(*inputs, 0.2, [Segment(slice(None), 0, 64)])
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in inputs]
