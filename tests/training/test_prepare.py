"""Laws of a model that is prepared as `finetune` prepares it: the same numbers, exact gradients.

Families with grouped heads, biases, a fused projection, norms of heads, windows, soft caps and odd
sizes, in all numbers of bits; levels of recompute, dropout and packing go round among them.
"""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from exact import adapter_gradients, exact_gradients, gradient_errors
from families import randomize_adapter
from micro_batches import micro_batches, ragged_rows
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.training.layer_forward import LayerForward
from qlora_kit.training.loop import train
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.optimizer import make_optimizer

ODD = 173
"""Of the MLP: rows are no multiple of a quantization block."""


def batch_of(packed=False, seed=0):
    rows = ragged_rows(4, seed)
    return collate_packs([rows[:3], rows[3:]], 0) if packed else collate(rows, 0)


def plain_loss(model, batch):
    """The same loss from all logits; in double, so that no difference of two is rounded away."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    targets = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), targets, reduction="sum")


@pytest.mark.parametrize(
    ("family", "bits", "level", "dropout", "packed"),
    [
        ("qwen2", 4, "full", 0.1, True),
        ("qwen2", 8, "selective", 0.0, False),
        ("qwen2", 16, "none", 0.1, True),
        ("phi3", 4, "selective", 0.0, True),
        ("phi3", 8, "none", 0.1, False),
        ("phi3", 16, "full", 0.1, False),
        ("gemma2", 4, "none", 0.1, True),
        ("gemma2", 8, "full", 0.0, True),
        ("gemma2", 16, "selective", 0.1, False),
        ("qwen3", 4, ("full", "none"), 0.1, False),
        ("mistral", 8, ("none", "selective"), 0.1, True),
        ("llama_bias", 4, ("selective", "full"), 0.1, False),
        ("granite", 8, ("full", "selective"), 0.1, True),
    ],
)
def test_gradients_equal_double_precision(model, family, bits, level, dropout, packed):
    options = {"dropout": dropout, "target_modules": "all-linear"}
    ours = model(bits, family=family, ffn=ODD, recompute=level, **options).train()
    randomize_adapter(ours, scale=0.05)
    for module in ours.modules():
        if isinstance(module, KeyedDropout):
            module.seek(3, 1)
    batch = batch_of(packed)
    supervised_loss(ours, batch).backward()
    exact = exact_gradients(ours, lambda reference: plain_loss(reference, batch))
    assert max(gradient_errors(adapter_gradients(ours), exact)) <= 1e-5


@pytest.mark.parametrize(
    ("family", "bits", "level"),
    [("qwen2", 8, "full"), ("qwen2", 4, "selective"), ("phi3", 4, "full"), ("phi3", 8, "none")],
)
def test_gradients_are_directional_finite_differences(model, family, bits, level):
    """Along the gradient, where the difference is largest against rounding."""
    ours = model(bits, family=family, ffn=ODD, recompute=level, target_modules="all-linear").train()
    randomize_adapter(ours, scale=0.05)
    batch, eps = batch_of(), 1e-2
    supervised_loss(ours, batch).backward()
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        norm, start, values = parameter.grad.norm(), parameter.data.clone(), []
        for sign in (1, -1):
            parameter.data = start + sign * eps * parameter.grad / norm
            with torch.no_grad():
                values.append(float(plain_loss(ours, batch)))
        parameter.data = start
        measured = (values[0] - values[1]) / (2 * eps)
        assert measured == pytest.approx(float(norm), rel=2e-3), name


@pytest.mark.parametrize(
    ("family", "bits", "dtype", "level", "tolerance"),
    [
        ("qwen2", 4, "fp32", "full", 1e-5),
        ("phi3", 8, "bf16", "selective", 5e-3),
        ("gemma2", 16, "fp32", "none", 1e-5),
        ("qwen3", 4, "bf16", "full", 5e-3),
    ],
)
def test_without_fused_blocks_the_numbers_are_the_same(
    model, family, bits, dtype, level, tolerance
):
    """The first loss bit for bit; those after it differ by sums in another order."""
    losses = []
    for own in (True, False):
        options = {"ffn": ODD, "recompute": level, "fused_blocks": own, "dropout": 0.1}
        ours = model(bits, dtype, family=family, target_modules="all-linear", **options)
        forwards = [layer.forward for layer in ours.base_model.layers]
        assert all(isinstance(forward, LayerForward) for forward in forwards)
        assert all((forward.block is not None) is own for forward in forwards)
        history = train(ours, micro_batches(6), make_optimizer("adamw", ours.parameters(), 1e-3))
        losses.append([report.loss for report in history])
    with_blocks, without = losses
    assert with_blocks[0] == without[0]
    assert with_blocks == pytest.approx(without, rel=tolerance)


class Kept:
    """What the graph keeps a tensor by."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_by(layer):
    """What the graph keeps of `layer`, as long as it does."""
    kept = weakref.WeakSet()

    def keep(tensor):
        kept.add(one := Kept(tensor))
        return one

    hooks = saved_tensors_hooks(keep, lambda one: one.tensor)
    layer.register_forward_pre_hook(lambda *_: hooks.__enter__())
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    return kept


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_below_the_first_adapter_have_no_graph(model, family, bits):
    """On every level they keep nothing, and nothing goes back through them."""
    targets, results = r"model\.layers\.1\.self_attn\.(q|qkv)_proj", []
    for level in ("none", "selective", "full"):
        ours = model(bits, "bf16", family=family, recompute=level, target_modules=targets).train()
        randomize_adapter(ours)
        below, above = ours.base_model.layers
        kept, inputs = (kept_by(below), kept_by(above)), []
        above.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        loss = supervised_loss(ours, batch_of())
        assert not kept[0]
        assert kept[1]
        loss.backward()
        assert not inputs[0].requires_grad
        gradients = [p.grad for p in ours.parameters() if p.grad is not None]
        assert len(gradients) == 2
        results.append([loss.detach(), *gradients])
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
