"""Laws of adapters that are computed together, as on CUDA, tried on the CPU."""

from __future__ import annotations

import pytest
import torch
from families import relative_error

from qlora_kit.kernels.rmsnorm import FrozenNorm
from qlora_kit.lora import low_rank
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.layer import LoRALinear, linears

IN, RANKS = 48, (4, 2, 8)


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def group(dtype, dropout=0.0, scalings=(1.5, 1.5, 1.5)):
    """Three linears with adapters of their own ranks, and one without between them."""
    layers = []
    for number, (r, scaling) in enumerate(zip(RANKS, scalings, strict=True)):
        base = torch.nn.Linear(IN, 20 + number, dtype=dtype).requires_grad_(False)
        base.weight.data = drawn(20 + number, IN, seed=number).to(dtype) / IN**0.5
        layer = LoRALinear(base)
        layer.add_adapter("a", r, scaling, dtype, KeyedDropout(dropout, 7, f"layer{number}"))
        a, b = layer.weights("a")
        a.data, b.data = drawn(r, IN, seed=8) / IN**0.5, drawn(20 + number, r, seed=9)
        layers.append(layer)
    layers.insert(1, layers[0].base_layer)
    return layers


def passed(layers, dtype, used=(0, 1, 2, 3), residual=False):
    """Outputs, and gradients by the input and by all masters."""
    x = drawn(2, 5, IN, seed=5, dtype=dtype).requires_grad_()
    norm = FrozenNorm(drawn(IN, seed=6, dtype=dtype), 1e-6, False)
    outputs = linears((x,), layers, norm, residual=residual)
    used = [*used, len(layers)] if residual else used
    masters = [w for layer in layers if hasattr(layer, "weights") for w in layer.weights("a")]
    grads = [drawn(*outputs[i].shape, seed=20 + i, dtype=dtype) for i in used]
    found = torch.autograd.grad([outputs[i] for i in used], [x, *masters], grads, allow_unused=True)
    return [y.detach() for y in outputs], found


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 3), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_together_they_are_what_each_is_alone(dtype, used, monkeypatch):
    """Up to roundings: of A x once more, and of a sum's parts; unused outputs included."""
    layers = group(dtype)
    alone = passed(layers, dtype, used)
    monkeypatch.setattr(low_rank, "device_type", lambda x: "cuda")
    assert low_rank.together([*map(part_of, layers)], torch.empty(0))
    together = passed(layers, dtype, used)
    limit = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip((*together[0], *together[1]), (*alone[0], *alone[1]), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype is theirs.dtype
            assert relative_error(ours.float(), theirs.float()) < limit


def part_of(layer):
    if not isinstance(layer, LoRALinear):
        return low_rank.Part(layer)
    dropout = layer.lora_dropout["a"]
    options = layer.scaling["a"], layer.adapter_dtypes["a"], dropout, dropout.position
    return low_rank.Part(layer.base_layer, layer.weights("a"), *options)


def test_dropout_or_scalings_of_their_own_keep_them_apart(monkeypatch):
    monkeypatch.setattr(low_rank, "device_type", lambda x: "cuda")
    for options in ({"dropout": 0.1}, {"scalings": (1.0, 1.5, 1.5)}):
        layers = group(torch.bfloat16, **options)
        assert not low_rank.together([*map(part_of, layers)], torch.empty(0))
        assert all(y.isfinite().all() for y in passed(layers, torch.bfloat16)[0])


@pytest.mark.parametrize("used", [(0, 1, 2, 3), ()])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_what_else_reads_the_input_has_its_gradient_added(used, on_cuda, monkeypatch):
    """Bit for bit what autograd adds, whether the linears' outputs are used or not."""
    if on_cuda:
        monkeypatch.setattr(low_rank, "device_type", lambda x: "cuda")
    layers = group(torch.bfloat16)
    (*_, beside), (together, *masters) = passed(layers, torch.bfloat16, used, residual=True)
    assert torch.equal(beside, drawn(2, 5, IN, seed=5, dtype=torch.bfloat16))
    expected = drawn(2, 5, IN, seed=20 + len(layers), dtype=torch.bfloat16)
    if used:
        _, (alone, *others) = passed(layers, torch.bfloat16, used)
        expected = expected + alone
        assert all(map(torch.equal, masters, others))
    assert torch.equal(together, expected)
