"""Laws of gradients that are kept in bf16: half the bytes, near the others, all else in fp32."""

from __future__ import annotations

import pytest
import torch
from adapted import adapted_model
from micro_batches import micro_batches

from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.memory.counter import adapter_bytes
from qlora_kit.training import gradients
from qlora_kit.training.loop import train, train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model, restore_model

BF16_TOLERANCE = 3e-2
"""Of a tensor of gradients in bf16 (parity.md, X13)."""


def prepared(dtype, **changes):
    model = adapted_model("llama2", targets="all-linear", **changes)
    prepare_model(model, TrainingConfig(gradient_dtype=dtype), "none")
    return model


def gradients_of(model, batches):
    """The accumulated gradients of some micro-batches, and the step's loss and norm."""
    found = {}

    def before_step(step, loss, norm):
        found.update(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
        return False

    optimizer = make_optimizer("adamw", model.parameters(), 1e-3)
    options = {"step": 1, "max_grad_norm": 1.0, "before_step": before_step}
    loss, norm = train_step(model, batches, optimizer, **options)
    return found, loss, norm


@pytest.mark.parametrize("count", [1, 4])
def test_sums_of_micro_batches_are_near_those_in_fp32(count):
    batches = [batch for step in micro_batches(count) for batch in step]
    exact, exact_loss, exact_norm = gradients_of(prepared("fp32"), batches)
    found, loss, norm = gradients_of(prepared("bf16"), batches)
    assert torch.equal(loss, exact_loss)
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm, exact_norm, rtol=BF16_TOLERANCE, atol=0)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert gradient.dtype is torch.bfloat16
        error = (gradient.float() - exact[name]).norm() / exact[name].norm()
        assert 0 < error <= BF16_TOLERANCE / 4, name  # 2**-9 for a rounding, and a few of them


def test_a_gradient_is_the_one_in_fp32_rounded_and_the_norm_is_of_those():
    (batches,) = micro_batches(1)
    exact, _, _ = gradients_of(prepared("fp32"), batches[:1])
    found, _, norm = gradients_of(prepared("bf16"), batches[:1])
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)
    summed = sum(one.double().square().sum() for one in found.values()).sqrt()
    torch.testing.assert_close(norm.double(), summed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion_8bit"])
@pytest.mark.parametrize("piece", [1, 2**24])
def test_a_step_is_that_of_the_rounded_gradients_whatever_the_pieces(optim, piece, monkeypatch):
    """Parameters and states, two steps long, against fp32 gradients that are rounded by hand."""
    monkeypatch.setattr(gradients, "PIECE", piece)
    results = []
    for dtype in ("bf16", "fp32"):
        model = prepared(dtype, bits=16)
        optimizer = make_optimizer(optim, model.parameters(), 1e-2)
        trained = [p for p in model.parameters() if p.requires_grad]

        def rounded(backward, parts, trained=trained):
            loss = backward(parts)
            for one in trained:
                one.grad = one.grad.bfloat16().to(one.grad_dtype)
            return loss

        steps = [step[:1] for step in micro_batches(2)]
        options = {"max_grad_norm": 0.1, "run_backward": rounded}
        for number, step in enumerate(steps, start=1):
            train_step(model, step, optimizer, step=number, **options)
        assert all(one.grad is None for one in trained)
        states = [optimizer.state[one] for one in trained]
        results.append(
            [*trained, *(v for s in states for v in s.values() if isinstance(v, torch.Tensor))]
        )
    ours, theirs = results
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        # The norms are summed in another order: their last bit may differ.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_take_half_the_bytes_and_an_overflow_is_seen():
    found = {}
    for dtype in ("fp32", "bf16"):
        model = prepared(dtype)
        optimizer = make_optimizer("adamw", model.parameters(), 1e-3)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]

        def look(step, loss, norm, model=model, dtype=dtype):
            found[dtype] = adapter_bytes(model)["gradients"]
            return norm == norm and norm != float("inf")

        def poisoned(backward, parts, model=model):
            loss = backward(parts)
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = torch.inf
            return loss

        train(model, micro_batches(1), optimizer, before_step=look, run_backward=poisoned)
        after = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert found["fp32"] == 2 * found["bf16"] > 0


def test_a_model_that_is_given_back_has_gradients_as_other_programs_expect_them():
    model = prepared("bf16")
    restore_model(model)
    assert {p.grad_dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_torch_without_such_gradients_is_refused(monkeypatch):
    """And without the option nothing is asked of it."""
    model = adapted_model("llama2")
    monkeypatch.setattr(gradients, "Tensor", object)  # of which the module asks for it
    gradients.keep_gradients_in("fp32", model.parameters())
    with pytest.raises(ConfigError, match="gradient_dtype bf16: torch 2"):
        gradients.keep_gradients_in("bf16", model.parameters())
