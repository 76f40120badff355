"""Laws of a model that is in memory layer by layer: the same bits, and one layer's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import TRAITS, save_checkpoint, token_ids

from qlora_kit.base.decoder import decoder_layers, hidden_states
from qlora_kit.base.layer_by_layer import layer_by_layer, layer_bytes
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.target import processor_with
from qlora_kit.memory.counter import StorageCounter


def opened(directory: Path, dtype: str = "fp32"):
    return open_base(BaseConfig(str(directory), bits=16, dtype=dtype, device="cpu"))


def hidden_of(model, batch=2, length=17):
    ids = token_ids(batch, length)
    with torch.no_grad():
        return hidden_states(model, ids, torch.arange(length).expand(ids.shape))


def is_empty(model):
    return all(p.is_meta for p in decoder_layers(model).parameters())


@pytest.mark.parametrize("family", TRAITS)
def test_it_gives_the_bits_of_the_whole_model(family, tmp_path):
    save_checkpoint(tmp_path, family)
    whole = hidden_of(load_base(str(tmp_path), bits=16, dtype="fp32", device="cpu").model)
    with layer_by_layer(opened(tmp_path)) as model:
        assert is_empty(model)
        assert torch.equal(hidden_of(model), whole)
        assert is_empty(model)
        assert torch.equal(hidden_of(model), whole)  # and again


def test_it_takes_the_memory_of_one_layer(tmp_path):
    layers = 12
    save_checkpoint(tmp_path, "llama2", torch.bfloat16, num_hidden_layers=layers)
    base = opened(tmp_path, "bf16")
    around, largest = layer_bytes(base)
    sizes = [entry.end - entry.start for entry in base.plain.values()]
    assert around + layers * largest == sum(sizes)
    # Without instructions for bf16 a workspace of fp32 comes beside it.
    native = processor_with(torch.bfloat16)
    with native, StorageCounter() as counter, layer_by_layer(base) as model:
        hidden_of(model, batch=1, length=2)
    # Beside it the buffer that is read into, and the few tokens' activations.
    assert counter.peak <= around + largest + max(sizes) + 2**17 < sum(sizes)


def test_a_layer_that_fails_leaves_no_weights(tmp_path):
    save_checkpoint(tmp_path, "llama2")
    with layer_by_layer(opened(tmp_path)) as model:
        with pytest.raises(RuntimeError):
            decoder_layers(model)[0](torch.zeros(1, 2, 3))
        assert is_empty(model)
