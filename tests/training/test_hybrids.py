"""Laws of models with convolutions and recurrences: no row reads another, however it is batched."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, relative_error, tiny_model
from hybrids import HYBRIDS, tiny_hybrid

from qlora_kit.base.recurrence import avoid_fused_training, check_packing, state_carriers
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError
from qlora_kit.training.loss import supervised_loss


def rows_of(*lengths):
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 264, (length,), generator=drawn).tolist() for length in lengths]
    return [Encoded(row, row) for row in ids]


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
