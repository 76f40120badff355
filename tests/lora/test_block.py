"""Laws of our block: transformers' numbers, exact gradients, and no more kept than is promised."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from adapted import RANK, adapted_model
from families import DENSE, FAMILIES, tiny_model, token_ids
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import processor_with
from qlora_kit.kernels import attention
from qlora_kit.kernels.rmsnorm import FrozenNorm, normalize
from qlora_kit.kernels.rotary import rotate
from qlora_kit.kernels.swiglu import ACTIVATIONS, Gate
from qlora_kit.lora.block_parts import norm_of
from qlora_kit.lora.inject import inject_lora
from qlora_kit.lora.layer import linears
from qlora_kit.training.layer_forward import use_fused_blocks


def outputs_of(model, ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    hidden = model.base_model(
        input_ids=ids, position_ids=positions, use_cache=False
    ).last_hidden_state
    model.zero_grad()
    drawn = torch.Generator().manual_seed(4)
    hidden.backward(torch.randn(hidden.shape, generator=drawn).to(hidden.dtype))
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_transformers(family, bits, targets, dropout):
    """Outputs bit for bit; gradients are summed in another order."""
    ids, results = token_ids(2, 11), []
    for own in (False, True):
        model = adapted_model(family, own=own, bits=bits, targets=targets, dropout=dropout)
        results.append(outputs_of(model, ids))
    (expected, gradients), (found, ours) = results
    assert torch.equal(found, expected)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("family", "bits", "dropout"),
    list(zip(DENSE, itertools.cycle((4, 8, 16)), itertools.cycle((0.0, 0.1)), strict=False)),
)
def test_numbers_of_newer_families_are_those_of_transformers(family, bits, dropout):
    test_numbers_are_those_of_transformers(family, bits, "all-linear", dropout)


@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
def test_bf16_is_as_near_to_fp32_as_transformers(family):
    """Outputs bit for bit; of the gradients none is further from fp32 than twice the other way."""
    ids = token_ids(2, 11)
    exact = outputs_of(adapted_model(family, own=False), ids)[1]
    results = [
        outputs_of(adapted_model(family, torch.bfloat16, own=own), ids) for own in (False, True)
    ]
    assert torch.equal(results[0][0], results[1][0])
    theirs, ours = (
        sum(float((one[name].float() - exact[name]).norm() / exact[name].norm()) for name in exact)
        for _, one in results
    )
    assert ours <= 1.2 * theirs


def kept_bytes(model, ids):
    """Bytes that each decoder layer's graph keeps, storages counted once, shared ones left out.

    What all layers share (parameters, positions) and what was there before is not counted.
    """
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    held, total = [], {}

    def pack(tensor):
        held.append(tensor)  # alive, so that no address comes twice
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            total[place] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(total.values())


SHAPES = {
    # heads, heads of keys, width of a head; what sets the family's list apart
    "llama2": (4, 4, 16),
    "llama_bias": (4, 2, 16),
    "qwen2": (4, 2, 16),
    "qwen3": (4, 2, 32),  # norms of heads, and queries wider than the hidden state
    "phi3": (4, 2, 16),  # fused projections
    "mistral": (2, 1, 128),  # wide heads: with tiles attention's output and statistics are kept
}


NEWER_SHAPES = {
    "smollm3": {"no_rope_layers": [1, 0, 0]},  # its last layer has no rotary embedding
    "olmo2": {},
    "ministral3": {},
    "granite4": {"layer_types": ["full_attention"] * 3, "shared_intermediate_size": 160},
    "glm4": {},
}
"""What makes these as deep and as wide as the others; four heads of 16, two of keys."""


def kept_by_one_layer(family, bits, targets, dropout, **sizes):
    """What three layers keep beyond two of them, of 64 tokens in 16 bits."""
    totals = []
    for layers in (2, 3):
        cut = {k: v[:layers] if isinstance(v, list) else v for k, v in sizes.items()}
        options = {"bits": bits, "packed": True, "targets": targets, "dropout": dropout}
        model = adapted_model(
            family,
            torch.bfloat16,
            num_hidden_layers=layers,
            intermediate_size=160,
            sliding_window=None,
            **cut,
            **options,
        )
        totals.append(kept_bytes(model, token_ids(2, 32)))
    return totals[1] - totals[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    ("family", "tiles"), [*((family, True) for family in SHAPES), ("mistral", False)]
)
def test_a_layer_keeps_what_its_docstring_lists(family, tiles, bits, targets, dropout, monkeypatch):
    """In 16 bits `2T(4h + 2kv + 2f)` bytes for T tokens, with queries as wide as their heads.

    Less attention's output where it is recomputed, and the scales of norms (4 bytes a token each)
    and the low-rank activations of adapted linears.
    """
    monkeypatch.setattr(attention, "TILES", tiles)
    hidden, ffn = 64, 160
    heads, kv_heads, width = SHAPES[family]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}
    with processor_with(torch.bfloat16):  # without, attention keeps what fp32 matmuls need
        found = kept_by_one_layer(family, bits, targets, dropout, **sizes)
    every, fused = targets == "all-linear", family == "phi3"
    a, kv, wide = heads * width, kv_heads * width, tiles and width > attention.NARROW
    numbers = hidden + a + 2 * kv + hidden + 2 * ffn
    numbers += a if every or wide else 0
    numbers += RANK * (4 if fused else 7) if every else RANK * (1 if fused else 2)
    scales = 2 + (heads if wide else 0)
    if family == "qwen3":
        numbers, scales = numbers + a + kv, scales + heads + kv_heads
    assert found == 64 * (2 * numbers + 4 * scales)


@pytest.mark.parametrize("family", NEWER_SHAPES)
def test_a_layer_of_newer_families_keeps_no_more(family):
    """As Llama's, and what norms behind and of all heads read, and a factor of queries."""
    sizes = {"head_dim": 16, **NEWER_SHAPES[family]}
    found = kept_by_one_layer(family, 4, "all-linear", 0.0, **sizes)
    hidden, kv, ffn = 64, 32, 160
    numbers = 4 * hidden + 2 * kv + 2 * ffn
    numbers += RANK * (6 if family in ("glm4", "granite4") else 7)
    scales = 2
    if family in ("olmo2", "glm4"):  # norms behind
        numbers, scales = numbers + 2 * hidden, scales + 2
    if family == "olmo2":  # none before; norms of all heads
        numbers, scales = numbers + hidden + kv, scales - 2 + 2
    numbers += family == "ministral3"
    assert found == 64 * (2 * numbers + 4 * scales)


def test_layers_below_the_first_adapter_have_no_graph():
    model = tiny_model("llama2")
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    inject_lora(model, LoRAConfig(r=RANK, target_modules=r"model\.layers\.1\..*q_proj"), seed=0)
    assert use_fused_blocks(model) is None
    seen = []
    model.base_model.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].requires_grad)
    )
    gradients = outputs_of(model.train(), token_ids(1, 5))[1]
    assert seen == [False]
    assert len(gradients) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_computes_something_else_is_left_alone(number):
    """Whichever layer it is, by its class or by a forward of its own."""
    model = tiny_model("llama2")
    model.set_attn_implementation("sdpa")
    layers = model.base_model.layers
    ids, before = token_ids(1, 5), [layer.forward for layer in layers]

    class Doubled(type(layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = type(layers[number].mlp)
    layers[number].mlp.__class__ = Doubled
    assert "stays as it is: ours differs by" in use_fused_blocks(model)
    layers[number].mlp.__class__ = plain
    layers[number].mlp.forward = lambda x: 2 * plain.forward(layers[number].mlp, x)
    assert "stays as it is: ours differs by" in use_fused_blocks(model)
    del layers[number].mlp.forward
    layers[number].mlp.forward = lambda x: torch.full_like(x, torch.nan)
    assert "stays as it is: ours differs by nan" in use_fused_blocks(model)
    del layers[number].mlp.forward
    layers[1].input_layernorm = torch.nn.LayerNorm(64)
    assert "its parts are not those" in use_fused_blocks(model)
    assert [layer.forward for layer in layers] == before
    assert model(ids).logits.isfinite().all()


def test_generation_with_a_cache_goes_through_the_models_own_code():
    ids = token_ids(1, 6)
    texts = []
    for own in (False, True):
        model = adapted_model("llama2", own=own).eval()
        with torch.no_grad():
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("from_zero", "rounds_once"), [(0, 0), (0, 1), (1, 0)])
def test_a_norm_rounds_where_its_family_does(from_zero, rounds_once, dtype):
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(24, generator=drawn).to(dtype)
    x = torch.randn(3, 5, 24, generator=drawn).to(dtype)
    tokens = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = ((1.0 if from_zero else 0.0) + weight.float()) * tokens
    if not (from_zero or rounds_once):
        expected = weight * tokens.to(dtype)
    norm = FrozenNorm(weight, 1e-6, bool(from_zero), bool(rounds_once))
    found, scale = norm.apply(x)
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(norm.recompute(x, kept=scale), found)


@pytest.mark.parametrize("from_zero", [False, True])
def test_a_norms_gradient_is_autograds(from_zero):
    module = torch.nn.Module()
    drawn = torch.Generator().manual_seed(0)
    module.weight = torch.nn.Parameter(torch.randn(24, generator=drawn).double(), False)
    norm = FrozenNorm(module.weight, 1e-6, from_zero)
    x = torch.randn(3, 5, 24, generator=drawn, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 24, generator=drawn, dtype=torch.float64)
    (found,) = torch.autograd.grad(normalize(norm, x), x, grad)
    weight = module.weight + 1 if from_zero else module.weight
    exact = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    (expected,) = torch.autograd.grad(exact, x, grad)
    # The scale of a token is fp32.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_is_known_by_its_numbers():
    class Centered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return torch.nn.functional.layer_norm(x, (8,), self.weight)

    assert norm_of(Centered()) is None
    assert norm_of(torch.nn.Identity()) is None
    gemma = tiny_model("gemma2").base_model.layers[0].input_layernorm
    assert norm_of(gemma).from_zero
    assert not norm_of(tiny_model("llama2").base_model.norm).from_zero


@pytest.mark.parametrize("family", ["llama", "glm4"])
@pytest.mark.parametrize("width", [8, 6])
def test_rotation_and_its_gradient(family, width):
    """By halves and by neighbours, as transformers writes both."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=drawn, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(2, 5, width // 2, generator=drawn, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    expected, _ = module.apply_rotary_pos_emb(x[..., :width], x[..., :width], cos, sin, 2)
    expected = torch.cat((expected, x[..., width:]), -1)
    interleaved = family == "glm4"
    assert torch.equal(rotate(x, cos, sin, interleaved), expected)
    assert torch.autograd.gradcheck(rotate, (x, cos, sin, interleaved))


@pytest.mark.parametrize("family", ["olmo2", "ernie4_5"])
def test_a_rotation_by_fp32_angles_rounds_once(family):
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=drawn).bfloat16()
    angles = torch.randn(2, 5, 4, generator=drawn).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    expected, _ = module.apply_rotary_pos_emb(x, x, cos, sin, 2)
    assert torch.equal(rotate(x, cos, sin, family == "ernie4_5"), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_gated_activation_and_its_gradient(kind, fused):
    drawn = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 6, generator=drawn, dtype=torch.float64) for _ in "gu")
    parts = (torch.cat((gate, up), -1),) if fused else (gate, up)
    for part in parts:
        part.requires_grad_()
    if fused:
        gate, up = parts[0].chunk(2, -1)
    identity = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64).requires_grad_(False)
    identity.weight.copy_(torch.eye(6))

    def gated(*inputs):
        return linears(inputs, [identity], Gate(kind))[0]

    assert torch.equal(gated(*parts), ACTIVATIONS[kind][0](gate) * up)
    assert torch.autograd.gradcheck(gated, parts)
