"""What the weights of a Llama-7B take, by the plan's own loading, against bf16."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_kit.base.config_only import open_shape
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.device.target import processor_with
from qlora_kit.plan.fake_model import HOST, FakeModel

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BF16 = 2 * 6_738_415_616
EMBEDDING = 2 * 32000 * 4096


@pytest.mark.parametrize(
    ("head_bits", "on_host", "most"),
    # The second figure does not count the embedding, which the host has then.
    [(16, False, 0.29), (8, True, 0.265)],
)
def test_weights_in_4_bits_take_a_share_of_bf16(tmp_path, head_bits, on_host, most):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    config = BaseConfig(str(path), bits=4, dtype="bf16", head_bits=head_bits)
    device = torch.device("cuda")
    placement = Placement(embedding_on_host=on_host)
    base = open_shape(config, device)
    assert 2 * base.parameters == BF16
    fake = FakeModel(base, LoRAConfig(r=1), TrainingConfig(), device, (8, 6), placement)
    sizes = fake.counter.sizes
    held = sizes["weights_quantized"] + sizes["weights_other"]
    assert 0.9 * most < held / BF16 <= most
    assert sizes.get(HOST, 0) == (EMBEDDING if on_host else 0)


@pytest.mark.parametrize(
    ("kind", "dtype", "least", "most"),
    # On a card fp32 is what matrices are held in too.
    [("cpu", "auto", 0.28, 0.29), ("cpu", "fp32", 0.28, 0.29), ("cuda", "fp32", 0.32, 0.33)],
)
def test_what_computes_in_fp32_on_a_processor_is_held_as_in_the_files(
    tmp_path, kind, dtype, least, most
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    device = torch.device(kind)
    with processor_with():
        base = open_shape(BaseConfig(str(path), bits=4, dtype=dtype), device)
        assert base.dtype is torch.float32
        sizes = FakeModel(base, LoRAConfig(r=1), TrainingConfig(), device, (8, 6)).counter.sizes
    assert least < (sizes["weights_quantized"] + sizes["weights_other"]) / BF16 <= most
    # What is said of it; beside it there are tables of rotary angles, and a few scales.
    assert base.in_16_bits is not None
    assert base.in_16_bits["bytes"] == pytest.approx(sizes["weights_other"], rel=0.01)
