"""The training step on a device: nothing mixed, nothing read back, only the batch copied."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerator import Copied, accelerator, in_order, of_batch, saved, small_batch

from qlora_kit.base.embedding import HostEmbedding
from qlora_kit.config.training import Placement
from qlora_kit.kernels.workspace import own_workspace, tagged_workspace
from qlora_kit.training.loop import train, train_step
from qlora_kit.training.loss import evaluate


def step(model: Any, optimizer: torch.optim.Optimizer, *batches: Any) -> None:
    loss, norm = train_step(model, batches, optimizer, step=1, max_grad_norm=1.0)
    assert loss.device == norm.device == model.device


def test_micro_batches_go_up_one_by_one_and_nothing_is_read() -> None:
    first, second = small_batch(), small_batch(seed=1)
    with accelerator() as card:
        model = card.adapted(saved("llama2"), recompute="full", dropout=0.1)
        optimizer, given = card.optimizer(model), [card.on_host(one) for one in (first, second)]
        with card.watch() as seen:
            step(model, optimizer, *given)
            step(model, optimizer, *given)
    assert in_order(seen.copied_in) == of_batch(first, second, first, second)
    assert seen.copied_out == []


@pytest.mark.parametrize(("family", "head_bits"), [("gemma3", 4), ("gemma4", 16)])
def test_of_an_embedding_on_the_host_the_rows_of_a_batch_go_up(family: str, head_bits: int) -> None:
    """Looked up by the ids that the host has anyway: nothing comes down for it, or is waited for.

    Tied to a head in 4 bits, with a factor on the device; the embeddings of all layers at once.
    """
    batch = small_batch()
    with accelerator() as card:
        placement = Placement(embedding_on_host=True)
        how: dict[str, Any] = {"bits": 4, "head_bits": head_bits, "placement": placement}
        model = card.adapted(saved(family), recompute="full", **how)
        (moved,) = (one for one in model.modules() if isinstance(one, HostEmbedding))
        assert moved.weight.device.type == "cpu"
        assert {one.device for one in model.parameters()} == {model.device} == {card.device}
        assert model.dtype is torch.bfloat16
        optimizer, given = card.optimizer(model), card.on_host(batch)
        with card.watch() as seen:
            step(model, optimizer, given)
        rows = Copied((*batch["input_ids"].shape, moved.embedding_dim), torch.bfloat16)
    assert in_order(seen.copied_in) == in_order([*of_batch(batch), rows])
    assert seen.copied_out == []


def test_a_run_waits_once_a_step_and_once_an_evaluation() -> None:
    """For the loss and the norm together, before the optimizer; for the sum of all batches."""
    batch, asked = small_batch(), []

    def before_step(step: int, loss: float, norm: float) -> bool:
        asked.append((step, loss, norm, seen.operations["aten::_fused_adamw_"]))
        return True

    with accelerator() as card:
        model = card.adapted(saved("llama2"), bits=4)
        optimizer, given = card.optimizer(model), card.on_host(batch)
        with card.watch(may_read=True) as seen:
            reports = train(model, [[given, given]] * 2, optimizer, before_step=before_step)
        assert seen.reads == [(2,)] * 2
        with card.watch(may_read=True) as seen:
            evaluate(model, [given] * 3)
        assert seen.reads == [(1,)]
    assert asked == [(1, 1.0, 1.0, 0), (2, 1.0, 1.0, 1)]
    assert [(one.loss, one.grad_norm) for one in reports] == [(1.0, 1.0)] * 2


def test_a_step_that_gives_no_gradient_has_its_norm_beside_its_loss() -> None:
    """In fp16 as well: so that the guard comes to say what is cut off from the loss."""
    batch = small_batch()
    with accelerator() as card:
        model = card.adapted(saved("llama2"))
        optimizer, given = card.optimizer(model), card.on_host(batch)

        def no_gradient(backward: Any, parts: Any) -> torch.Tensor:
            return torch.zeros((), device=model.device)

        options = {"step": 1, "max_grad_norm": 1.0, "loss_scale": 1024.0}
        loss, norm = train_step(model, [given], optimizer, run_backward=no_gradient, **options)
        assert loss.device == norm.device == model.device


def test_backward_tells_its_workspace_from_a_thread_of_its_own() -> None:
    """As on CUDA: autograd runs what belongs to a device in a thread of that device."""
    batch, threads = small_batch(), []

    def tag(component: str, tensors: Any) -> None:
        threads.extend(threading.get_ident() for _ in tensors)

    with accelerator() as card:
        model = card.adapted(saved("llama2"))
        optimizer, given = card.optimizer(model), card.on_host(batch)
        with own_workspace({}), tagged_workspace(tag):
            step(model, optimizer, given)
    here = threading.get_ident()
    assert here in threads
    assert set(threads) > {here}
