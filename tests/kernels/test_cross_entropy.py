"""Laws of the chunked loss: the same as all logits in fp32, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit.device.target import is_native
from qlora_kit.kernels.cross_entropy import CHUNK_TOKENS, cross_entropy_sum
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.memory.counter import StorageCounter


def reference(tokens, head, targets, softcap, scale=1.0):
    """All logits at once, in double."""
    logits = tokens.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.4), (3.0, 0.4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # fp16 has three bits more than bf16.
    [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 5e-3 / 8)],
)
def test_chunks_equal_the_whole(softcap, scale, bias, count, dtype, tolerance):
    """In 16 bits both start from the same rounded inputs; the logits are rounded once more."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randn(count, 32, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(32, 211, bias=bias).requires_grad_(False)
    nn.init.normal_(head.weight, std=0.3, generator=generator)
    if bias:
        nn.init.normal_(head.bias, generator=generator)
    head = head.to(dtype)
    targets = torch.randint(0, 211, (count,), generator=generator)
    loss = cross_entropy_sum(tokens, head, targets, softcap, scale)
    (3 * loss).backward()
    exact = tokens.detach().double().requires_grad_()
    expected = reference(exact, head, targets, softcap, scale)
    (3 * expected).backward()
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    difference = tokens.grad.double() - exact.grad
    assert difference.norm() < tolerance * exact.grad.norm()
    error = difference.abs().max() / exact.grad.abs().max()
    # The matmuls sum in the dtype of the head: 211 terms.
    assert error < tolerance * (1 if dtype is torch.float32 else 2)


def test_a_tied_head_gets_no_gradient_and_the_tokens_do():
    embedding = nn.Embedding(50, 16)
    head = nn.Linear(16, 50, bias=False)
    head.weight = embedding.weight
    embedding.requires_grad_(False)
    tokens = torch.randn(9, 16, requires_grad=True)
    cross_entropy_sum(tokens, head, torch.arange(9)).backward()
    assert head.weight.grad is None
    assert tokens.grad is not None
    expected = torch.autograd.grad(reference(tokens, head, torch.arange(9), None), tokens)[0]
    assert (tokens.grad - expected).abs().max() < 1e-6 * expected.abs().max()


def test_no_tokens_are_no_loss():
    tokens = torch.zeros(0, 16, requires_grad=True)
    loss = cross_entropy_sum(tokens, nn.Linear(16, 5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0.0
    assert tokens.grad.shape == (0, 16)


def test_only_the_tokens_are_kept_for_backward():
    """What is saved has the size of the tokens, never that of the logits."""
    tokens, head = (
        torch.randn(600, 16, requires_grad=True),
        nn.Linear(16, 4096).requires_grad_(False),
    )
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy_sum(tokens, head, torch.zeros(600, dtype=torch.int64))
    assert sum(kept) <= tokens.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_one_chunk_are_alive_at_most(dtype, softcap, bias):
    """6 bytes a logit: a chunk in fp32 and in 16 bits, which hold its gradient too.

    A soft cap keeps its slope, a chunk in fp32 more. The rest has the size of the hidden states.
    """
    vocabulary, count = 4096, 5 * CHUNK_TOKENS + 3
    tokens = torch.randn(count, 16).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,))
    head = nn.Linear(16, vocabulary, bias=bias).to(dtype).requires_grad_(False)
    # A workspace of its own: in that of other tests the widened head may lie in more memory.
    with own_workspace({}), StorageCounter(head) as counter:
        counter.tag("given", (tokens, targets))
        known = counter.current
        loss = cross_entropy_sum(tokens, head, targets, softcap)
        counter.at("backward")
        loss.backward()
    forward, backward = (interval.peak - known for interval in counter.intervals)
    a_logit = (4 if dtype is torch.float32 else 6) + (0 if softcap is None else 4)
    assert forward <= a_logit * vocabulary * CHUNK_TOKENS + 2 * tokens.nbytes
    # What forward widened of the head, where the processor does not multiply its dtype.
    backward -= 0 if is_native(dtype) else 4 * head.weight.numel()
    assert backward <= 3 * tokens.nbytes  # ours, times the gradient of the loss, and what is kept


def test_transformers_loss_holds_all_logits_in_fp32():
    """More than 10 bytes a logit while it upcasts them, next to their log-softmax and gradients."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    vocabulary, count = 4096, 5 * CHUNK_TOKENS + 3
    tokens = torch.randn(1, count, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (1, count))
    head = nn.Linear(16, vocabulary, bias=False).bfloat16().requires_grad_(False)
    with StorageCounter(head) as counter:
        ForCausalLMLoss(head(tokens), targets, vocabulary).backward()
    assert counter.peak - counter.before > 10 * vocabulary * count
