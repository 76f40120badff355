"""Laws of a base that is streamed from its entry in the cache, where memory is too small for it."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from families import save_checkpoint

from qlora_kit.base import cache as base_cache
from qlora_kit.base import layer_store, unheld
from qlora_kit.base.decoder import decoder_layers
from qlora_kit.base.kept_base import listed, read_manifest
from qlora_kit.base.layer_store import EntryStore
from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ModelError
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss

STREAMED = Placement(base_on_host=True)
ROW = [1, *range(3, 30)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of one test, in which small bases are kept too."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache" / "bases"))
    monkeypatch.setattr(base_cache, "SMALLEST", 0)
    monkeypatch.setattr(base_cache, "JUST_NOW", 0.0)
    monkeypatch.setattr(base_cache, "LEFT_FREE", 0)
    return tmp_path / "cache" / "bases"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_checkpoint(folder, "llama_bias", torch.bfloat16, num_hidden_layers=4)
    return folder


@pytest.fixture
def short(monkeypatch):
    """The host has not the memory for the layers."""
    monkeypatch.setattr(layer_store, "SPARE", 2**60)


def load(directory, placement=ON_DEVICE, **options):
    notes = []
    base = open_base(BaseConfig(str(directory), **{"dtype": "fp32", "device": "cpu", **options}))
    read_weights(base, placement=placement, note=notes.append)
    return base.model, notes


def results_of(model):
    """Loss and gradients of a model with new adapters."""
    inject_lora(model, LoRAConfig(r=4, target_modules="all-linear", dropout=0.1), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    set_recompute(model.train(), ["none", "full", "selective", "none"])
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = supervised_loss(model, collate([Encoded(ROW, ROW)], 0))
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return found


def files_of(cache):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in cache.rglob("base*")}


FORMS = [{}, {"bits": 8}, {"skip_modules": "o_proj,layers.1.mlp", "double_quant": False}]


@pytest.mark.parametrize("form", FORMS)
def test_from_files_and_from_memory_it_is_the_base(plain, cache, monkeypatch, form):
    """Kept of a streamed base, read back to be streamed from memory, and from the files."""
    resident, notes = load(plain, base_cache=False, **form)
    expected = results_of(resident)
    made, notes = load(plain, STREAMED, **form)
    assert any("kept in the cache" in one for one in notes)
    kept, before = load(plain, **form)[0], files_of(cache)
    found = [made, kept, load(plain, STREAMED, **form)[0]]
    monkeypatch.setattr(layer_store, "SPARE", 2**60)
    found.append(load(plain, STREAMED, **form)[0])
    is_streamed = ["streamed" in vars(decoder_layers(m)[1].mlp.up_proj) for m in found]
    assert is_streamed == [True, False, True, True]
    for model in found:
        results = results_of(model)
        assert len(results) == len(expected) > 2
        assert all(map(torch.equal, results, expected))
    assert files_of(cache) == before
    linears = [m for m in found[-1].modules() if isinstance(m, QuantizedLinear)]
    others = [m for m in found[1].modules() if isinstance(m, QuantizedLinear)]
    for ours, theirs in zip(linears, others, strict=True):
        assert torch.equal(dequantize(ours, torch.float32), dequantize(theirs, torch.float32))


@pytest.mark.parametrize("form", [*FORMS, {"head_bits": 4}])
def test_what_the_host_cannot_hold_is_made_into_the_files(plain, cache, short, form):
    """Tensor by tensor, to the bytes of an entry that was made of a whole model."""
    expected = results_of(load(plain, base_cache=False, **form)[0])
    load(plain, **form)
    (whole,) = (read_manifest(one.path) for one in listed(cache))
    shutil.rmtree(cache)
    model, notes = load(plain, STREAMED, **form)
    assert any("kept in the cache" in one for one in notes)
    (parts,) = (read_manifest(one.path) for one in listed(cache))
    assert parts.linears == whole.linears
    hashes = [{n: (t.shape, t.sha256) for n, t in one.tensors.items()} for one in (parts, whole)]
    assert hashes[0] == hashes[1]
    assert parts.nbytes <= unheld.most_bytes(
        open_base(BaseConfig(str(plain), dtype="fp32", **form))
    )
    assert all(map(torch.equal, results_of(model), expected))


def test_an_entry_that_is_cleared_meanwhile_is_still_read(plain, cache, short):
    expected = results_of(load(plain)[0])
    model, _ = load(plain, STREAMED)
    for path in files_of(cache):
        path.unlink()
    assert all(map(torch.equal, results_of(model), expected))


def test_a_damaged_entry_is_made_again(plain, cache, short):
    expected = results_of(load(plain)[0])
    for path in cache.rglob("base-*"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="made again"):
        model, _ = load(plain, STREAMED)
    assert all(map(torch.equal, results_of(model), expected))


def test_a_file_that_ends_early_is_named(plain, cache, short):
    """In the middle of a run: what was checked is not there any more."""
    load(plain)
    model, _ = load(plain, STREAMED)
    results_of(model)
    for path in cache.rglob("base-*"):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"base-00001\.safetensors: ended early, while"):
        results_of(model)
    assert EntryStore.waits
