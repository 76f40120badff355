"""Laws of LoRALinear against autograd in double precision on the weights that it multiplies by."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapted import adapted_model
from families import tiny_model, token_ids
from torch.utils.checkpoint import checkpoint

from qlora_kit.base.linear import dequantize, quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.layer import LoRALinear, Masters
from qlora_kit.lora.low_rank import delta_weight
from qlora_kit.training.optimizer import make_optimizer

IN, OUT, R, SCALING = 44, 28, 4, 1.5
FORMATS = [
    Quantization(16),
    Quantization(8),
    Quantization(4, "nf4", True),
    Quantization(4, "fp4", False),
]


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(form, dtype, *, bias=True, adapter_dtype=None, dropout=0.0):
    weight, offset = drawn(OUT, IN, seed=1).to(dtype), drawn(OUT, seed=2).to(dtype)
    if form.bits == 16:
        base = torch.nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        base.weight.data = weight
        if bias:
            base.bias.data = offset
        base.requires_grad_(False)
    else:
        base = quantize_linear(weight, offset if bias else None, form)
    layer = LoRALinear(base)
    layer.add_adapter("a", R, SCALING, adapter_dtype or dtype, KeyedDropout(dropout, 7, "layer"))
    a, b = layer.weights("a")
    a.data, b.data = drawn(R, IN, seed=3) / math.sqrt(IN), drawn(OUT, R, seed=4)
    return layer


def reference(layer, x, grad, form, mask=None):
    """Output and gradients by x, A, B from autograd in fp64.

    The base is multiplied by as it is: 8-bit weights are never rounded, others are held in the
    compute dtype. A and B count as rounded to the adapter dtype.
    """
    dense = dequantize(layer.base_layer, torch.float32 if form.bits == 8 else x.dtype).double()
    dtype = layer.adapter_dtypes["a"]
    a, b = (w.detach().to(dtype).double().requires_grad_() for w in layer.weights("a"))
    x = x.detach().double().requires_grad_()
    bias = layer.base_layer.bias
    low = x if mask is None else x * mask
    y = F.linear(x, dense, None if bias is None else bias.double())
    y = y + SCALING * F.linear(F.linear(low, a), b)
    y.backward(grad.double())
    return y.detach(), x.grad, a.grad, b.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "forward", "backward"),
    [
        (torch.float32, torch.float32, 1e-6, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-2, 3e-2),
        (torch.bfloat16, torch.float32, 1e-2, 3e-2),
        (torch.float16, torch.float16, 1e-3, 3e-3),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_output_and_gradients_equal_double_precision(
    form, dtype, adapter_dtype, forward, backward, bias
):
    layer = make(form, dtype, bias=bias, adapter_dtype=adapter_dtype)
    x = drawn(2, 5, IN, seed=5).to(dtype).requires_grad_()
    grad = drawn(2, 5, OUT, seed=6).to(dtype)
    y = layer(x)
    y.backward(grad)
    a, b = layer.weights("a")
    assert y.dtype is dtype
    assert a.grad.dtype is b.grad.dtype is torch.float32
    ours = (y.detach(), x.grad, a.grad, b.grad)
    tolerances = (forward, backward, backward, backward)
    for mine, exact, limit in zip(ours, reference(layer, x, grad, form), tolerances, strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_are_directional_finite_differences(form):
    layer = make(form, torch.float32)
    x, grad = drawn(3, IN, seed=5), drawn(3, OUT, seed=6)
    (layer(x) * grad).sum().backward()
    for parameter in layer.weights("a"):
        direction = drawn(*parameter.shape, seed=8)
        direction /= direction.norm()
        eps, values, start = 1e-2, [], parameter.data.clone()
        for sign in (1, -1):
            parameter.data = start + sign * eps * direction
            with torch.no_grad():
                values.append(float((layer(x).double() * grad).sum()))
        parameter.data = start
        measured = (values[0] - values[1]) / (2 * eps)
        # The output is bilinear in A and B: the difference has no error but that of rounding.
        assert measured == pytest.approx(float((parameter.grad * direction).sum()), rel=2e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_a_fresh_adapter_and_no_adapter_are_the_base(form):
    layer = make(form, torch.bfloat16)
    x = drawn(3, IN, seed=5).bfloat16()
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.switch.active = None
    assert torch.equal(layer(x), base)
    layer.add_adapter("fresh", 2, 8.0, torch.bfloat16, KeyedDropout(0.0, 0, "layer"))
    assert layer.switch.active == Masters("fresh")
    assert torch.equal(layer(x), base)
    layer.remove_adapter("fresh")
    assert torch.equal(layer(x), base)
    assert list(layer.lora_A) == ["a"]


def test_masters_are_fp32_and_keep_what_bf16_would_lose():
    layer = make(Quantization(4, "nf4", True), torch.bfloat16)
    a, b = layer.weights("a")
    assert a.dtype is b.dtype is torch.float32
    # A bf16 parameter near 1 does not move by 1e-3 (its step there is 8e-3): see the sum of ten.
    upstream = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(10):
        upstream += 1e-3
    assert upstream == 1
    a.data.fill_(1.0)
    x = torch.ones(1, IN, dtype=torch.bfloat16)
    before = layer(x)
    for _ in range(10):
        a.data += 1e-3
    assert not torch.equal(layer(x), before)


def test_pure_bf16_adapters_stop_training_and_masters_do_not():
    def frozen_share(parameter):
        start = parameter.detach().clone()
        optimizer = torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.0)
        for step in range(60):
            parameter.grad = drawn(*parameter.shape, seed=step).to(parameter.dtype) + 0.5
            optimizer.step()
        return float((parameter == start).float().mean())

    layer = make(Quantization(16), torch.bfloat16)
    layer.weights("a")[0].data = drawn(R, IN, seed=9) / 4
    bf16 = torch.nn.Parameter(layer.weights("a")[0].detach().bfloat16())
    assert frozen_share(bf16) > 0.5
    assert frozen_share(layer.weights("a")[0]) < 0.01


def still_share(model, optimizer):
    """Of the entries of all lora_A that had a gradient, the share that 20 steps left in place."""
    ids = token_ids(2, 11)
    held = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
    start = [parameter.detach().clone() for parameter in held]
    had = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in held]
    for _ in range(20):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for seen, parameter in zip(had, held, strict=True):
            seen |= parameter.grad != 0
        optimizer.step()
        optimizer.zero_grad()
    still = sum(
        int(((parameter == first) & seen).sum())
        for parameter, first, seen in zip(held, start, had, strict=True)
    )
    return still / sum(int(seen.sum()) for seen in had)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_pefts_bf16_adapters_stand_still_and_ours_all_move(bits):
    """At 1e-5 a step is less than half a bf16 ulp of all entries above 2.6e-3: 96 % of them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    theirs = get_peft_model(tiny_model(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    adapters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapters} == {torch.bfloat16}
    assert still_share(theirs, torch.optim.AdamW(adapters, lr=1e-5, weight_decay=0.0)) > 0.5
    ours = adapted_model(dtype=torch.bfloat16, bits=bits, targets="q_proj,v_proj")
    assert still_share(ours, make_optimizer("adamw", ours.parameters(), 1e-5)) == 0


def test_delta_weight_is_what_the_layer_adds():
    layer = make(Quantization(16), torch.float32)
    x = drawn(5, IN, seed=5)
    added, update = layer(x) - layer.base_layer(x), delta_weight(Masters("a").part(layer))
    assert torch.allclose(x @ update.t(), added, rtol=1e-4, atol=1e-5)


def test_backward_keeps_the_input_and_the_low_rank_product_only():
    layer = make(Quantization(4, "nf4", True), torch.bfloat16)
    x = drawn(6, IN, seed=5).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.weights("a")}
    shapes = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in parameters)
    assert shapes == [(6, R), (6, IN)]


@pytest.mark.parametrize("adapted", [True, False])
def test_a_second_derivative_is_refused(adapted):
    """Backward knows no graph of its own: what came of one would be wrong."""
    layer = make(Quantization(4, "nf4", True), torch.float32)
    layer.switch.active = Masters("a") if adapted else None
    x = drawn(6, IN, seed=5).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# Dropout


def test_dropout_and_its_gradient_equal_a_reference_with_the_same_mask():
    form = Quantization(4, "nf4", True)
    layer = make(form, torch.float32, dropout=0.4).train()
    layer.lora_dropout["a"].seek(3, 1)
    x = drawn(6, IN, seed=5).requires_grad_()
    grad = drawn(6, OUT, seed=6)
    mask = layer.lora_dropout["a"](torch.ones_like(x)).detach()
    y = layer(x)
    y.backward(grad)
    ours = (y.detach(), x.grad, *(w.grad for w in layer.weights("a")))
    for mine, exact in zip(ours, reference(layer, x, grad, form, mask.double()), strict=True):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()


def test_the_mask_belongs_to_seed_layer_step_and_micro_step():
    x = torch.ones(64, 64)

    def mask(seed=1, name="layer", step=1, micro_step=0, p=0.5):
        dropout = KeyedDropout(p, seed, name).train()
        dropout.seek(step, micro_step)
        return dropout(x)

    same = mask()
    torch.manual_seed(99)
    assert torch.equal(mask(), same)
    for other in (
        mask(seed=2),
        mask(name="other"),
        mask(step=2),
        mask(micro_step=1),
        mask(step=0, micro_step=1),
    ):
        # Independent masks of p = 1/2 agree on half of 4096 places, give or take 5 sigma.
        assert abs(float((other == same).float().mean()) - 0.5) < 5 * 0.5 / 64
    for p in (0.1, 0.5, 0.9):
        kept = mask(p=p)
        assert abs(float((kept != 0).float().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p)) / 64
        assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)))


def test_dropout_draws_nothing_from_the_global_generator_and_rests_in_evaluation():
    layer = make(Quantization(16), torch.float32, dropout=0.5).train()
    x = drawn(3, IN, seed=5)
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    plain = make(Quantization(16), torch.float32)
    assert torch.equal(layer.eval()(x), plain(x))
    assert not torch.equal(layer.train()(x), plain(x))


@pytest.mark.parametrize("form", FORMATS)
def test_recomputation_draws_the_same_mask(form):
    results = []
    for recomputed in (False, True):
        layer = make(form, torch.float32, dropout=0.3).train()
        layer.lora_dropout["a"].seek(5, 2)
        x = drawn(6, IN, seed=5).requires_grad_()

        def run(x, layer=layer):
            return layer(x * 2).tanh()

        if recomputed:
            y = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = run(x)
        y.sum().backward()
        results.append((y.detach(), x.grad, *(w.grad for w in layer.weights("a"))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
