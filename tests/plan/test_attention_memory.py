"""What attention takes on a card, in plans: no mask of all pairs, and no scores of all pairs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch
from qlora_kit.device.target import planned_device
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.training.attention import attend, set_packed_attention
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 4096}])
def test_packs_and_windows_take_what_whole_rows_take(tmp_path, changes):
    """Six layers of Llama 3.1 8B, 16,384 tokens, nothing recomputed.

    Under a mask of all pairs, which every layer keeps in 16 bits, all 32 take 42 % more in packs.
    """
    config = {**LLAMA_8B, **changes, "vocab_size": 32000, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseConfig(str(tmp_path / "config.json"), bits=4, dtype="bf16")
    training = TrainingConfig(optim="adamw", gradient_checkpointing="none")
    planner = Planner(base, LoRAConfig(), training, "cuda")
    whole, packed = (
        planner.plan(BatchShape(1, 16384, 16384, packs, 8000 if packs else None)).peak_bytes
        for packs in (False, True)
    )
    assert whole <= packed <= 1.03 * whole


def attended(card, dtype, length, **options):
    """Bytes kept for backward, and the most elements of a tensor, of 32 heads and 8 key heads."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), planned_device("cuda", card), Scanned(length) as seen:
        q, k, v = (
            torch.empty(1, length, n, 128, dtype=dtype).transpose(1, 2).requires_grad_()
            for n in (32, 8, 8)
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output, _ = attend(SimpleNamespace(), q, k, v, None, **options)
        output.sum().backward()
    return sum(kept.values()), seen


@pytest.mark.parametrize("card", [(7, 5), (8, 6), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"softcap": 50.0}])
def test_no_card_takes_the_scores_of_all_pairs(card, dtype, options):
    """On a T4, 2,048 tokens: torch's own choice is its math kernel, 1.75 GB a layer."""
    length = 2048
    kept, seen = attended(card, dtype, length, **options)
    # Queries and the output, keys and values once a group, and 4 bytes a head and position.
    expected = dtype.itemsize * length * (2 * 32 + 2 * 8) * 128 + 4 * 32 * length
    assert kept <= expected
    assert seen.pairs == []
    # 32 heads, 2,048 queries and 2,048 keys have 8 times as many.
    assert seen.most <= 2**24


class Scanned(TorchDispatchMode):
    """The operations that give a tensor with two dimensions of a length, and the most elements."""

    def __init__(self, length):
        super().__init__()
        self.length, self.pairs, self.most = length, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
                if sum(size >= self.length for size in one.shape) > 1:
                    self.pairs.append((func, one.shape))
        return found


WINDOWED = ("smollm3_window", "olmo3", "exaone4", "gemma3", "gemma4")
POINTS = [(family, (9, 0)) for family in ("llama3", "phi3", "mistral", "gemma2", *WINDOWED)]
POINTS += [("llama3", (7, 5)), ("mistral", (7, 5))]
LENGTH = 1040
"""Above every other size of a tiny model."""


@pytest.mark.parametrize(("family", "card"), POINTS)
def test_a_step_on_a_card_has_no_pairs_of_positions(family, card):
    """Forward, recomputation and backward, packed and not, windows and soft caps."""
    model = tiny_model(family, torch.float16, max_position_embeddings=4096)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    mode = FakeTensorMode()
    without_values(model, mode)
    with mode, planned_device("cuda", card):
        assert set_packed_attention(model)
        set_recompute(model.train(), "full")
        for lengths in ([LENGTH], [700, LENGTH - 700]):
            ids = [torch.empty(2, LENGTH, dtype=torch.int64) for _ in range(3)]
            places = torch.empty(40, dtype=torch.int64)
            starts = torch.empty(2 * len(lengths) + 1, dtype=torch.int32)
            packed = len(lengths) > 1
            batch = Batch(
                **dict(zip(("input_ids", "labels", "position_ids"), ids, strict=True)),
                supervised=places,
                num_supervised=40,
                lengths=[LENGTH] * 2,
                packed=packed,
                row_lengths=[lengths],
                row_starts=starts,
            )
            with Scanned(LENGTH) as seen:
                supervised_loss(model, batch).backward()
            assert seen.pairs == []


def without_values(model, mode):
    """The model on fake tensors."""
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(one.detach()))
        for name, one in module._buffers.items():
            module._buffers[name] = mode.from_tensor(one)
