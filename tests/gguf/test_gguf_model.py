"""A GGUF of every family, read by llama.cpp and by transformers, is the model.

Both are asked for the same tokens as the model itself. llama.cpp computes in fp32 with a cache in
fp32; of its activations GELU comes from a table in fp16. Tiny random models hide nothing: rows in a
wrong order, a forgotten factor or window change their logits by more than one.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from families import relative_error
from gguf_models import WRITTEN, by_transformers, distance, some_ids, write_model

KNOWN_KL = 1e-5
"""Nats a token, in F32 and F16."""
NOT_READ = ("mistral", "granite", "smollm3")
"""Models that transformers 5.23 has no reader for; a Mistral it reads as a Llama."""
READ_ALONE = ("llama2", "mistral", "qwen2")
"""Those for which it takes all that matters from the file: others need their config."""


@pytest.mark.parametrize("name", WRITTEN)
def test_two_readers_have_the_model(name: str, tmp_path: Path) -> None:
    model, ids = write_model(tmp_path, name), some_ids()
    kl, agreed = distance(model, ids)
    assert kl <= KNOWN_KL
    assert agreed == 1
    configs = [None] * (name in READ_ALONE) + [model.base.model.config] * (name not in NOT_READ)
    for config in configs:
        read = by_transformers(model.file, config)
        with torch.no_grad():
            theirs = read(ids[None]).logits[0]
        assert relative_error(theirs, model.logits(ids)) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "kinds", "limit"), [("q8_0", "Q8_0", 5e-3), ("bf16", "BF16", 1e-3)]
)
def test_types_are_read(dtype: str, kinds: str, limit: float, tmp_path: Path) -> None:
    """The MLP of this model has rows of 173, no whole blocks: they are F16 beside Q8_0.

    Rounding to bf16 takes a tiny random model 1e-4 nats away, to 8 bits 1e-3.
    """
    model = write_model(tmp_path, "llama2", dtype)
    found = {one.name: one.tensor_type.name for one in gguf.GGUFReader(model.file).tensors}
    assert found["blk.1.attn_q.weight"] == found["token_embd.weight"] == kinds
    assert found["blk.1.ffn_down.weight"] == ("F16" if dtype == "q8_0" else kinds)
    assert found["output_norm.weight"] == found["blk.1.attn_norm.weight"] == "F32"
    assert model.file.name == f"model-{kinds}.gguf"
    assert distance(model, some_ids())[0] <= limit
