"""Gemma 3, 3n and 4 as they are published: older fields, tensors that nothing reads, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import (
    edit_config,
    edit_weights,
    refused,
    relative_error,
    save_checkpoint,
    save_tokenizer,
    token_ids,
)
from transformers import AutoModelForCausalLM

from qlora_kit.base.config_only import open_shape
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import ModelError
from qlora_kit.export.export import export_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each family; tests that change one take a copy."""
    root = tmp_path_factory.mktemp("gemma")
    for family in ("gemma3", "gemma4", "gemma4_dense"):
        save_checkpoint(root / family, family)
    return root


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids, use_cache=False).logits


def load(directory, **options):
    return load_base(str(directory), bits=16, dtype="fp32", device="cpu", **options)


def test_keys_that_no_layer_reads_are_left_in_the_file(bases, tmp_path):
    """Published checkpoints have keys and values of the layers that read those of others."""
    copy = shutil.copytree(bases / "gemma4", tmp_path / "base")

    def add(tensors):
        for leaf, shape in (("k_proj", (32, 64)), ("v_proj", (32, 64)), ("k_norm", (16,))):
            tensors[f"model.layers.2.self_attn.{leaf}.weight"] = torch.full(shape, 7.0)

    edit_weights(copy, add)
    base = load(copy)
    assert torch.equal(logits(base.model), logits(load(bases / "gemma4").model))
    assert not any("layers.2.self_attn.k_" in name for name in base.entries)
    shape = open_shape(BaseConfig(str(copy), bits=4), CPU)
    assert shape.entries.keys() == base.entries.keys()
    edit_weights(copy, lambda tensors: tensors.update({"model.layers.0.mlp.x": torch.ones(1)}))
    with refused(ModelError, "holds model.layers.0.mlp.x", directory=copy):
        open_base(BaseConfig(str(copy)))


def test_fields_as_published_give_the_same_model(bases, tmp_path):
    """Gemma 4's of global layers, Gemma 3's old ones of both rotary embeddings."""
    copy = shutil.copytree(bases / "gemma4", tmp_path / "gemma4")
    edit_config(copy, per_layer_config=None, global_head_dim=32, num_global_key_value_heads=1)
    assert torch.equal(logits(load(copy).model), logits(load(bases / "gemma4").model))
    copy = shutil.copytree(bases / "gemma3", tmp_path / "gemma3")
    edit_config(
        copy,
        rope_parameters=None,
        layer_types=None,
        sliding_window_pattern=2,
        rope_theta=10000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    ours = load(copy).model
    assert ours.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(logits(ours), logits(load(bases / "gemma3").model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enable_moe_block": True, "num_experts": 8, "moe_intermediate_size": 64}, "experts"),
        ({"enable_moe_block": True}, "enable_moe_block is True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"hidden_size_per_layer_input": 0}, "num_kv_shared_layers needs"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config"),
        (
            {"per_layer_config": {key: {"head_dim": 31} for key in ("1", "3")}},
            "heads of 31 elements",
        ),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, "not homogeneous"),
        # Newer releases of transformers build it, with MLPs of another size.
        (
            {"num_kv_shared_layers": 4},
            "no model that can be built|do not fit config",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(bases, tmp_path, changes, said):
    copy = shutil.copytree(bases / "gemma4", tmp_path / "base")
    edit_config(copy, **changes)
    before = (copy / "config.json").read_bytes()
    with pytest.raises(Exception, match=said) as caught:
        open_base(BaseConfig(str(copy)))
    assert type(caught.value).__module__ == "qlora_kit.errors"
    assert (copy / "config.json").read_bytes() == before


def test_layers_of_their_own_are_refused_in_other_families(tmp_path):
    save_checkpoint(tmp_path / "base", "llama2")
    edit_config(tmp_path / "base", per_layer_config={"1": {"head_dim": 32}})
    with refused(ModelError, "per_layer_config changes", "'llama'", directory=tmp_path / "base"):
        open_base(BaseConfig(str(tmp_path / "base")))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_larger_embedding_grows_in_every_layer_and_is_exported(bases, tmp_path, family):
    copy = shutil.copytree(bases / family, tmp_path / "base")
    save_tokenizer(copy, extra=16)
    base = load(copy, resize_embeddings=True)
    rows = base.embedding_rows
    assert rows > 264
    ids = token_ids()
    kept = logits(base.model, ids)[..., :264]
    assert relative_error(kept, logits(load(bases / family).model, ids)) <= 1e-6
    export_model(base, tmp_path / "export", adapter=None)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["vocab_size"] == rows
    assert config.get("vocab_size_per_layer_input", rows) == rows
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    new = torch.full((1, 3), rows - 1)
    assert relative_error(logits(read, new), logits(base.model, new)) <= 1e-5
