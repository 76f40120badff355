"""Laws of models with convolutions and recurrences: no row reads another, however it is batched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact import adapter_gradients, exact_gradients, gradient_errors
from families import FAMILIES, relative_error, tiny_model, token_ids
from hybrids import HYBRIDS, save_hybrid, tiny_hybrid
from micro_batches import trained
from torch import Tensor
from trained import trained_base

from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.load import load_base
from qlora_kit.base.recurrence import avoid_fused_training, check_packing, state_carriers
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError
from qlora_kit.lora.inject import lora_layers
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss

TOLERANCE = 1e-5
"""fp32 sums in another order; a recurrence adds the rounding of one token to the next."""
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("hybrids")
    for kind in HYBRIDS:
        save_hybrid(root / kind, kind, **(SHALLOW if kind == "qwen3_5_text" else {}))
    return root


def rows_of(*lengths):
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 264, (length,), generator=drawn).tolist() for length in lengths]
    return [Encoded(row, row) for row in ids]


def adapted(bases, kind, bits=16, **lora):
    config = LoRAConfig(r=4, alpha=6, target_modules="all-linear", **lora)
    options = {"bits": bits, "dtype": "fp32", "device": "cpu"}
    return trained_base(bases / kind, lora=config, **options).model.train()


def gradients(model, rows):
    model.zero_grad()
    loss = supervised_loss(model, collate(rows, 0))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_logits_are_those_of_transformers_and_gradients_those_of_autograd(bases, kind, bits):
    ids = token_ids()
    if bits == 16:
        plain = load_base(str(bases / kind), bits=16, dtype="fp32", device="cpu").model
        theirs = type(plain).from_pretrained(bases / kind).eval()
        with torch.no_grad():
            found, expected = (m(input_ids=ids, use_cache=False).logits for m in (plain, theirs))
        assert relative_error(found, expected) <= TOLERANCE

    def loss(reference: torch.nn.Module) -> Tensor:
        logits = reference(input_ids=ids, use_cache=False).logits.double()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    model = adapted(bases, kind, bits)
    gradients(model, [Encoded(row, row) for row in ids.tolist()])
    assert max(gradient_errors(adapter_gradients(model), exact_gradients(model, loss))) <= TOLERANCE


@pytest.mark.parametrize("kind", HYBRIDS)
def test_rows_of_a_batch_are_each_row_alone_at_every_level(bases, kind):
    """Padding stands behind the tokens, where nothing reads it."""
    model = adapted(bases, kind, 8, dropout=0.1)
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"].p = 0.0  # a mask belongs to a place in a batch
    rows = rows_of(70, 23, 41)
    loss, found = gradients(model, rows)
    alone = [gradients(model, [row]) for row in rows]
    assert relative_error(loss, sum(one for one, _ in alone)) <= TOLERANCE
    for name, gradient in found.items():
        assert relative_error(gradient, sum(each[name] for _, each in alone)) <= TOLERANCE, name
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"].p = 0.1
    loss, found = gradients(model, rows)
    for level in ("full", "selective"):
        set_recompute(model, level)
        again, same = gradients(model, rows)
        assert torch.equal(again, loss)
        assert all(torch.equal(same[name], found[name]) for name in found)


def test_what_servers_drop_is_left_alone(bases):
    """The two small projections of the gated delta rule: neither quantized nor adapted."""
    model = adapted(bases, "qwen3_5_text", 4)
    mixer = model.model.layers[0].linear_attn
    for name in ("in_proj_a", "in_proj_b"):
        assert type(getattr(mixer, name)) is torch.nn.Linear
    for name in ("in_proj_qkv", "in_proj_z", "out_proj"):
        assert isinstance(getattr(mixer, name).base_layer, QuantizedLinear)
    named = trained_base(
        bases / "qwen3_5_text", lora=LoRAConfig(r=4, target_modules="in_proj_a"), dtype="fp32"
    ).model
    assert {name.split(".")[-4] for name in trained(named)} == {"in_proj_a"}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_rows_of_a_pack_would_leak(kind):
    """What is refused is wrong indeed: the second row of a pack reads the first one."""
    model = tiny_hybrid(kind)
    first, second = (torch.tensor([row.input_ids]) for row in rows_of(20, 12))
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(20), torch.arange(12)))[None]
    with torch.no_grad():
        alone = model(input_ids=second, use_cache=False).logits
        beside = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, 20:]
    assert relative_error(beside, alone) > 1e-3


@pytest.mark.parametrize("kind", HYBRIDS)
def test_packs_are_refused(kind):
    model = tiny_hybrid(kind)
    assert all("conv" in name for name in state_carriers(model))
    rows = rows_of(9, 5)
    with pytest.raises(ConfigError, match=f"packing.*{kind}.*conv"):
        supervised_loss(model, collate_packs([rows], 0))
    assert not collate(rows, 0)["packed"]
    assert not collate_packs([[row] for row in rows], 0)["packed"]


def test_a_recurrence_without_a_convolution_is_found():
    """By what transformers keeps of a layer between tokens, or by what its class says."""
    model = tiny_hybrid("lfm2")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Conv1d):
            model.get_submodule(name.rpartition(".")[0]).conv = torch.nn.Identity()
    assert state_carriers(model) == ["conv layers"]
    model.config.layer_types = ["full_attention"] * 3
    assert state_carriers(model) == []
    model._is_stateful = True
    assert state_carriers(model) == ["Lfm2ForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_alone_packs(family):
    check_packing(tiny_model(family))


def test_no_fused_kernel_takes_the_weights_past_the_layers(monkeypatch):
    """The kernel of `mamba_ssm` reads `out_proj.weight` itself; its parts still train."""
    model = tiny_hybrid("bamba")
    avoid_fused_training(model)
    asked = []
    module = __import__(type(model).__module__, fromlist=["x"])
    monkeypatch.setattr(
        module, "mamba2_split_conv1d_scan_combined", lambda *a, **k: asked.append(a)
    )
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert not asked
    assert model.model.layers[0].mamba.out_proj.training
