"""Laws of the base cache: the model that was made, tensor by tensor, or none of it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from any_model import save_random
from families import save_checkpoint, token_ids
from wrappers import save_wrapped

from qlora_kit.base import cache as base_cache
from qlora_kit.base.cache import code_files, wanted
from qlora_kit.base.cache_entry import DamagedError, EntryReader
from qlora_kit.base.embedding import HostEmbedding
from qlora_kit.base.kept_base import MANIFEST, listed
from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.load import load_base, read_weights
from qlora_kit.base.open import open_base
from qlora_kit.base.quantize import Quantization
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.training import Placement
from qlora_kit.files.opened import is_own

FORMS = {
    "nf4": {},
    "nf4_single": {"double_quant": False},
    "fp4": {"quant_type": "fp4"},
    "fp4_single": {"quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
    "skipped": {"skip_modules": "o_proj,layers.1.mlp"},
    "bf16": {"dtype": "bf16"},
    "head4": {"head_bits": 4},
    "head8_of_4": {"head_bits": 8, "double_quant": False},
    "head4_of_8": {"bits": 8, "head_bits": 4},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of one test, in which small bases are kept too."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache" / "bases"))
    monkeypatch.setattr(base_cache, "SMALLEST", 0)
    monkeypatch.setattr(base_cache, "JUST_NOW", 0.0)
    monkeypatch.setattr(base_cache, "LEFT_FREE", 0)
    return tmp_path / "cache" / "bases"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_checkpoint(folder, "llama_bias", torch.bfloat16)
    return folder


def load(directory, notes=None, **options):
    """A base, loaded; what was noted is added to `notes`."""
    asked = BaseConfig(str(directory), **{"dtype": "fp32", "device": "cpu", **options})
    base = open_base(asked)
    read_weights(base, note=(lambda text: None) if notes is None else notes.append)
    if notes is not None:
        notes += base.notes
    return base


def is_from_cache(base) -> bool:
    return any("from the cache" in note for note in base.notes)


def same(one, other) -> None:
    """Two loaded models have the same tensors, in the same places, and the same numbers."""
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    buffers = dict(other.model.named_buffers())
    for name, buffer in one.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert [type(m) for m in one.model.modules()] == [type(m) for m in other.model.modules()]
    assert not any(p.requires_grad for p in other.model.parameters())
    assert not other.model.training
    with torch.no_grad():
        logits = [
            base.model(input_ids=token_ids(), use_cache=False).logits for base in (one, other)
        ]
    assert torch.equal(*logits)


def the_entry(cache: Path) -> Path:
    (entry,) = (one.path for one in listed(cache))
    return entry


def twice(directory, **options):
    """A base as it is made, and as it comes from the cache."""
    made, again = load(directory, **options), load(directory, **options)
    assert (is_from_cache(made), is_from_cache(again)) == (False, True)
    same(made, again)
    return made, again


@pytest.mark.parametrize("form", FORMS)
def test_what_was_kept_is_what_was_made(plain, cache, form):
    twice(plain, **FORMS[form])
    assert os.stat(cache).st_mode & 0o777 == 0o700
    entry = the_entry(cache)
    assert os.stat(entry).st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in entry.iterdir())


@pytest.mark.parametrize("head_bits", [16, 8])
@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3", "qwen3"])
def test_families_come_back(bases, family, head_bits):
    twice(bases / family, head_bits=head_bits)


@pytest.mark.parametrize("kind", ["opt", "bloom", "mamba", "gemma3"])
def test_other_kinds_come_back(tmp_path, kind):
    """Learned positions, ALiBi, recurrences in fp32, the decoder of a multimodal model."""
    if kind == "gemma3":
        save_wrapped(tmp_path / kind, kind)
    else:
        save_random(tmp_path / kind, kind)
    twice(tmp_path / kind, dtype="bf16")


@pytest.mark.parametrize("head_bits", [16, 4])
def test_an_embedding_comes_back_to_the_host(plain, head_bits):
    base, place = twice(plain, head_bits=head_bits)[0], Placement(embedding_on_host=True)
    hosted = [open_base(BaseConfig(str(plain), dtype="fp32", device="cpu", head_bits=head_bits))]
    read_weights(hosted[0], placement=place)
    assert is_from_cache(hosted[0])
    assert isinstance(hosted[0].model.get_input_embeddings(), HostEmbedding)
    with torch.no_grad():
        logits = [one.model(input_ids=token_ids()).logits for one in (base, *hosted)]
    assert torch.equal(*logits)


def test_an_embedding_of_the_host_is_kept(plain, cache):
    base = open_base(BaseConfig(str(plain), dtype="fp32", device="cpu"))
    read_weights(base, placement=Placement(embedding_on_host=True))
    again = load(plain)
    assert is_from_cache(again)
    same(load(plain, base_cache=False), again)


def test_new_rows_of_the_embedding_come_back(tmp_path):
    save_checkpoint(tmp_path / "model", "llama3", vocab_size=250)
    made, again = (load(tmp_path / "model", resize_embeddings=True) for _ in range(2))
    assert is_from_cache(again)
    rows = [base.model.get_input_embeddings().weight for base in (made, again)]
    assert made.embedding_rows == len(rows[0]) > 250
    assert torch.equal(*rows)


def test_each_setting_has_an_entry_of_its_own(plain, cache):
    for options in FORMS.values():
        load(plain, **options)
    assert len(listed(cache)) == len(FORMS)
    for options in FORMS.values():
        assert is_from_cache(load(plain, **options))


def test_what_needs_none_has_none(plain, cache, monkeypatch):
    load(plain, bits=16)
    load(plain, base_cache=False)
    monkeypatch.setattr(base_cache, "SMALLEST", 64 * 1024**2)
    load(plain)
    load_base("tiny")
    assert not cache.exists()


def test_many_files_come_back(plain, cache, monkeypatch):
    monkeypatch.setattr("qlora_kit.base.cache_entry.SHARD", 20_000)
    twice(plain)
    assert len(list(the_entry(cache).iterdir())) > 4


def test_one_tensor_is_read_alone(plain, cache):
    base = load(plain)
    place = wanted(base)
    kept = place.found()
    with EntryReader(place.path, kept) as reader:
        for name, tensor in base.model.state_dict().items():
            into = reader.empty(name, torch.device("cpu"))
            reader.read(name, into)
            assert torch.equal(into, tensor)


@pytest.mark.parametrize("change", ["value", "touched", "config", "replaced"])
def test_a_changed_source_is_made_anew(plain, tmp_path, cache, change):
    """Also where neither size nor sampled bytes say so: the times of its files do."""
    model = shutil.copytree(plain, tmp_path / "model")
    load(model)
    file = model / "model.safetensors"
    before = file.stat()
    if change == "value":  # in the middle of nowhere, and with its old times
        with open(file, "r+b") as opened:
            opened.seek(-3000, os.SEEK_END)
            byte = opened.read(1)
            opened.seek(-3000, os.SEEK_END)
            opened.write(bytes([byte[0] ^ 1]))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "touched":
        os.utime(file)
    elif change == "config":
        (model / "config.json").write_text(
            (model / "config.json").read_text().replace("1e-0", "2e-0")
        )
    else:
        shutil.copy2(file, model / "other")
        os.replace(model / "other", file)
    again = load(model)
    assert not is_from_cache(again)
    same(load(model, base_cache=False), again)
    assert len(listed(cache)) == 1
    assert is_from_cache(load(model))


def test_a_source_written_just_now_is_not_kept(plain, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(base_cache, "JUST_NOW", 60.0)
    notes: list[str] = []
    load(shutil.copytree(plain, tmp_path / "model"), notes)
    assert "written meanwhile" in notes[0]
    assert not listed(cache)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_code_that_quantizes_is_part_of_what_an_entry_is_made_by(bits):
    """Of the package's kernels; what they are given and where it is put is in `base`."""
    ran: set[str] = set()
    form = Quantization(bits, "nf4", True) if bits == 4 else Quantization(bits)
    sys.setprofile(lambda frame, event, arg: ran.add(frame.f_code.co_filename))
    try:
        quantize_linear(torch.randn(8, 128), None, form)
    finally:
        sys.setprofile(None)
    kernels = {Path(name) for name in ran if Path(name).parent.name == "kernels"}
    assert bool(kernels) == (bits == 4)
    assert kernels <= set(code_files())


def test_damage_anywhere_is_never_used(plain, tmp_path, cache):
    made = load(plain)
    entry, rng = the_entry(cache), random.Random(0)
    kept = shutil.copytree(entry, tmp_path / "kept")
    for case in range(60):
        shutil.rmtree(entry)
        shutil.copytree(kept, entry)
        name = rng.choice(sorted(os.listdir(entry)))
        held = bytearray((kept / name).read_bytes())
        where = rng.randrange(len(held))
        if case % 10 == 9:
            held = held[:where]
        elif case % 10 == 8:
            held += b"\0"
        else:
            held[where] ^= 1 << rng.randrange(8)
        (entry / name).write_bytes(held)
        place = wanted(made)
        with pytest.raises((DamagedError, OSError, ValueError)):  # noqa: PT012
            found = place.found()
            assert found is not None
            with EntryReader(place.path, found) as reader:
                into = {one: reader.empty(one, torch.device("cpu")) for one in found.tensors}
                reader.read_all(into)
    with pytest.warns(UserWarning, match="made again"):
        same(made, load(plain))
    assert is_from_cache(load(plain))


def test_files_that_are_missing_or_none_are_not_used(plain, cache):
    made = load(plain)
    entry = the_entry(cache)
    file = entry / "base-00001.safetensors"

    def removed(path):
        path.unlink()

    def linked(path):
        os.rename(path, cache / "away")
        path.symlink_to(cache / "away")

    def folder(path):
        path.unlink()
        path.mkdir()

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    for path in (file, entry / MANIFEST):
        for spoilt in (removed, linked, folder, pipe):
            spoilt(path)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                same(made, load(plain))
            assert bool(said) == (spoilt is not removed)
            assert is_from_cache(load(plain)), spoilt
    os.rename(entry, cache / "moved")
    entry.symlink_to(cache / "moved")
    same(made, load(plain))
    assert not entry.is_symlink()
    assert is_from_cache(load(plain))


@pytest.mark.parametrize("who", ["cache", "entry", "file", "manifest"])
def test_what_others_may_write_to_is_not_used(plain, cache, who):
    made = load(plain)
    entry = the_entry(cache)
    path = {
        "cache": cache,
        "entry": entry,
        "file": entry / "base-00001.safetensors",
        "manifest": entry / MANIFEST,
    }[who]
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.warns(UserWarning, match=f"this user alone: chmod go-w .*{path.name}$"):
        same(made, load(plain))
    if who != "cache":  # it was written again
        assert is_from_cache(load(plain))


def test_another_users_files_are_nobodys_of_ours():
    for path in ("/etc/passwd", "/"):
        status = os.stat(path)
        other = os.stat_result((status[0], status[1], status[2], status[3], 4242, *status[5:]))
        assert is_own(status) == (os.geteuid() == 0)
        assert not is_own(other)


@pytest.mark.parametrize("name", ["manifest", "tensors"])
def test_what_cannot_be_read_now_stays(plain, cache, name):
    """As where no more files may be open: the entry is whole, and used by the next start."""
    made = load(plain)
    entry = the_entry(cache)
    before = {path.name: path.stat().st_ino for path in entry.iterdir()}
    path = entry / (MANIFEST if name == "manifest" else "base-00001.safetensors")

    def refused(event, args):
        if armed and event == "open" and args[0] == path.name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    armed = True
    sys.addaudithook(refused)
    with pytest.warns(UserWarning, match="left alone, and made for this run: .*Too many open"):
        same(made, load(plain))
    armed = False
    assert {path.name: path.stat().st_ino for path in entry.iterdir()} == before
    assert is_from_cache(load(plain))


def test_a_full_disk_keeps_nothing_and_the_run_goes_on(plain, cache, monkeypatch):
    monkeypatch.setattr(base_cache, "LEFT_FREE", 2**60)
    notes: list[str] = []
    base = load(plain, notes)
    assert "stay free" in notes[0]
    assert not listed(cache)
    same(base, load(plain, base_cache=False))


def test_a_place_that_is_no_directory_keeps_nothing(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file" / "bases"))
    notes: list[str] = []
    load(plain, notes)
    assert "is not kept" in notes[0]
    assert (tmp_path / "file").read_text() == ""
