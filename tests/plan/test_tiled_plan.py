"""Plans of tiled MLPs: what is counted, and what a token takes."""

from __future__ import annotations

import json

import pytest
import torch
from counted_steps import counted_step
from families import save_checkpoint, token_ids

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.dropout import TILE_TOKENS
from qlora_kit.plan.plan import BatchShape, Planner
from qlora_kit.plan.plan_memory import plan_memory

TILED = Placement(mlp_tiled=True)


def batch_of(rows, length):
    ids = token_ids(rows, length).tolist()
    return collate([Encoded(row, row) for row in ids], 0)


POINTS = [
    ("llama3", 4, "full", 0.1),
    ("phi3", 8, "selective", 0.0),
    ("gemma2", 4, "none", 0.0),
    ("qwen3", 16, "full", 0.0),
]


@pytest.mark.parametrize(("family", "bits", "level", "dropout"), POINTS)
def test_planned_equals_counted(tmp_path, family, bits, level, dropout):
    """Four rows of 600 tokens are two tiles."""
    changes = {"num_hidden_layers": 3, "intermediate_size": 192}
    save_checkpoint(tmp_path / "base", family, torch.bfloat16, **changes)
    base = BaseConfig(str(tmp_path / "base"), bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=8, target_modules="all-linear", dropout=dropout)
    training = TrainingConfig(
        optim="adamw",
        gradient_checkpointing=level,
        batch_size=4,
        gradient_accumulation_steps=1,
        tiled_mlp=True,
    )
    batches = [batch_of(4, 600)]
    found = counted_step(base, lora, training, level, batches, batch_of(1, 16), TILED)
    plan = plan_memory(base, lora, training, length=600)
    assert plan.placement == TILED
    for phase in ("forward", "backward", "step"):
        assert plan.phases[phase] == max(one.peak for one in found if one.phase == phase)


def test_a_token_takes_six_of_its_hidden_states(tmp_path):
    """Llama 3.1 8B on a card, all layers recomputed: a token's checkpoints, and one layer's moment.

    Without tiles that moment is 162 KB a token; a tile itself does not grow with the row.
    """
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseConfig(str(tmp_path / "config.json"), bits=4, dtype="bf16")
    training = TrainingConfig(optim="adamw", gradient_checkpointing="full", tiled_mlp=True)
    planner = Planner(base, LoRAConfig(r=32, target_modules="all-linear"), training, "cuda")
    lengths = 16 * TILE_TOKENS, 32 * TILE_TOKENS
    short, long = (planner.plan(BatchShape(1, n, n)).peak_bytes for n in lengths)
    hidden = 2 * config["hidden_size"]
    a_token = (long - short) / (lengths[1] - lengths[0])
    # The layer's own input is one of the checkpoints. Inside attention's kernels: half of one.
    assert a_token <= (31 + 6.75) * hidden
