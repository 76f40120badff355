"""Laws of the loss of each token: the chunked loss, not yet summed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kit.kernels.cross_entropy import (
    CHUNK_TOKENS,
    cross_entropy_sum,
    cross_entropy_tokens,
)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [0, 1, 2 * CHUNK_TOKENS + 7])
def test_each_token_has_its_own_loss_and_gradient(count, softcap):
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randn(count, 32, generator=generator).requires_grad_()
    head = nn.Linear(32, 211, bias=False).requires_grad_(False)
    targets = torch.randint(0, 211, (count,), generator=generator)
    weights = torch.randn(count, generator=generator)
    losses = cross_entropy_tokens(tokens, head, targets, softcap, 0.7)
    (losses * weights).sum().backward()
    exact = tokens.detach().double().requires_grad_()
    logits = 0.7 * (exact @ head.weight.double().t())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(tokens.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_equal_weights_give_the_bits_of_the_sum():
    tokens, targets = torch.randn(300, 32), torch.randint(0, 50, (300,))
    head = nn.Linear(32, 50).requires_grad_(False)
    one, other = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    cross_entropy_sum(one, head, targets).backward()
    cross_entropy_tokens(other, head, targets).sum().backward()
    assert torch.equal(one.grad, other.grad)
