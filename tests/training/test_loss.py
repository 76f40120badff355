"""Laws of the chunked loss: the same as all logits in fp32, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit.training.loss import CHUNK_ROWS, cross_entropy_sum


def reference(rows, head, targets, softcap):
    """All logits at once, in double."""
    logits = rows.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_chunks_equal_the_whole(softcap, bias, count, dtype, tolerance):
    """X23. In bf16 both start from the same rounded inputs; the logits are rounded once more."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 32, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(32, 211, bias=bias).requires_grad_(False)
    nn.init.normal_(head.weight, std=0.3, generator=generator)
    if bias:
        nn.init.normal_(head.bias, generator=generator)
    head = head.to(dtype)
    targets = torch.randint(0, 211, (count,), generator=generator)
    loss = cross_entropy_sum(rows, head, targets, softcap)
    (3 * loss).backward()
    exact = rows.detach().double().requires_grad_()
    expected = reference(exact, head, targets, softcap)
    (3 * expected).backward()
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    error = (rows.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    # The products sum in the dtype of the head: 211 terms.
    assert error < tolerance * (2 if dtype is torch.bfloat16 else 1)


def test_a_tied_head_gets_no_gradient_and_the_rows_do():
    embedding = nn.Embedding(50, 16)
    head = nn.Linear(16, 50, bias=False)
    head.weight = embedding.weight
    embedding.requires_grad_(False)
    rows = torch.randn(9, 16, requires_grad=True)
    cross_entropy_sum(rows, head, torch.arange(9)).backward()
    assert head.weight.grad is None
    assert rows.grad is not None
    expected = torch.autograd.grad(reference(rows, head, torch.arange(9), None), rows)[0]
    assert (rows.grad - expected).abs().max() < 1e-6 * expected.abs().max()


def test_no_rows_are_no_loss():
    rows = torch.zeros(0, 16, requires_grad=True)
    loss = cross_entropy_sum(rows, nn.Linear(16, 5), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0.0
    assert rows.grad.shape == (0, 16)


def test_only_the_rows_are_kept_for_backward():
    """What is saved has the size of the rows, never that of the logits."""
    rows, head = torch.randn(600, 16, requires_grad=True), nn.Linear(16, 4096).requires_grad_(False)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy_sum(rows, head, torch.zeros(600, dtype=torch.int64))
    assert sum(kept) <= rows.numel()
