"""Laws of a directory: every file that is opened is listed, in it, bounded and itself."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from families import refused, save_checkpoint, tree_hash
from transformers import AutoTokenizer

from qlora_kit.base.checks import read_base
from qlora_kit.base.contents import find, tokenizer_files
from qlora_kit.base.hub import TEMPLATES
from qlora_kit.base.open import open_base
from qlora_kit.base.source import Source
from qlora_kit.base.tokenizer import copy_tokenizer, load_tokenizer
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import ModelError, TokenizerError, UnsafeInputError
from qlora_kit.files.kind import SAFETENSORS, file_kind

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1044992\n"
LOADED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", f"{TEMPLATES}/tool_use.jinja"),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    place = tmp_path_factory.mktemp("contents") / "model"
    save_checkpoint(place, "llama_bias")
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (place / "special_tokens_map.json").write_text("{}")
    (place / TEMPLATES).mkdir()
    (place / TEMPLATES / "tool_use.jinja").write_text("{{ tools }}")
    return place


@pytest.fixture
def model(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "model")


def open_all(directory: Path) -> None:
    """As every command does before it imports torch."""
    read_base(Source("model", None, directory))


def archive(kind: str) -> bytes:
    held = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(held, "w") as made:
            made.writestr("model.safetensors", b"x" * 99)
    else:
        with tarfile.open(fileobj=held, mode="w") as made:
            made.addfile(tarfile.TarInfo("model.safetensors"))
    return held.getvalue()


def torch_file(**how: bool) -> bytes:
    held = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, held, **how)
    return held.getvalue()


KINDS = {
    "pointer": (POINTER, "is a git-lfs pointer; fetch the file that it stands for: git lfs pull"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><head>", "is an HTML page; fetch the file again"),
    "xml": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is an XML document"),
    "gzip": (gzip.compress(b"x" * 99), "is a gzip archive; unpack it"),
    "zip": (archive("zip"), "is a zip archive"),
    "tar": (archive("tar"), "is a tar archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file; give the model's safetensors"),
    "pickle": (pickle.dumps({"a": 1}), "is a pickle, which can run code"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "is a pickle, which can run code"),
    "torch": (torch_file(), "is a pickle, which can run code"),
    "old torch": (torch_file(_use_new_zipfile_serialization=False), "is a pickle"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "zeros": (bytes(4096), "is a file of zeros"),
}
WEIGHTS_ONLY = {
    "answer": (b"Entry not found", "is a text ('Entry not found')"),
    "json": (b'{"error": "Access to model is restricted"}', 'is a text (\'{"error"'),
}


@pytest.mark.parametrize("kind", [*KINDS, *WEIGHTS_ONLY])
def test_weights_that_are_something_else_are_called_by_what_they_are(model, kind):
    content, said = {**KINDS, **WEIGHTS_ONLY}[kind]
    (model / "model.safetensors").write_bytes(content)
    error = UnsafeInputError if "pickle" in said else ModelError
    with refused(error, "model.safetensors: ", said, directory=model):
        read_base(Source("model", None, model))


@pytest.mark.parametrize("name", LOADED)
def test_so_are_the_files_beside_them(model, name):
    for content, said in KINDS.values():
        (model / name).write_bytes(content)
        error = UnsafeInputError if "pickle" in said else TokenizerError
        if name in ("config.json", "generation_config.json"):
            error = error if "pickle" in said else ModelError
        with refused(error, f"{name}: ", said, directory=model):
            open_all(model)


def test_a_header_whose_length_begins_like_a_pickle_is_a_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    for first in (0x280, 0x8B1F):  # of a pickle, of gzip
        path.write_bytes(first.to_bytes(8, "little") + b"{" + b" " * (first - 2) + b"}")
        assert file_kind(path.read_bytes()) is SAFETENSORS


@pytest.mark.parametrize("name", LOADED)
def test_a_link_to_nothing_is_a_broken_directory_and_not_an_absent_file(model, name):
    (model / name).unlink()
    (model / name).symlink_to("nowhere")
    error = ModelError if "tok" not in name and "template" not in name else TokenizerError
    with refused(error, f"{name}: is a link to nowhere, where nothing is", directory=model):
        open_all(model)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_so_it_is_where_the_other_form_of_the_weights_is_there(model, name):
    for path in model.glob("model*"):
        path.rename(model / "other")
    (model / name).symlink_to("nowhere")
    with refused(ModelError, f"{name}: is a link to nowhere", directory=model):
        read_base(Source("model", None, model))


@pytest.mark.parametrize("name", LOADED)
def test_no_file_may_be_elsewhere_a_pipe_a_device_or_larger_than_its_kind_can_be(model, name):
    path, outside = model / name, model.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with refused(UnsafeInputError, f"{name}: links to", "outside the model", directory=model):
        open_all(model)
    path.unlink()
    path.symlink_to("/dev/zero")
    with refused(UnsafeInputError, name, directory=model):
        open_all(model)
    path.unlink()
    os.mkfifo(path)
    with refused(UnsafeInputError, f"{name}: is not a regular file", directory=model):
        open_all(model)
    path.unlink()
    path.write_bytes(b"")
    os.truncate(path, 3 * 1024**3)
    error = ModelError if "tok" not in name and "template" not in name else TokenizerError
    began = os.times().user
    with pytest.raises(error, match=f"{path}: has 3221225472 bytes; a file like this has at most"):
        open_all(model)
    assert os.times().user - began < 2


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ("../tokenizer.4.0.json", UnsafeInputError, "leaves the directory"),
        ("/etc/tokenizer.4.0.json", UnsafeInputError, "leaves the directory"),
        ("tokenizer.4.0.json", TokenizerError, "tokenizer.4.0.json: no such file"),
        (5, TokenizerError, "fast_tokenizer_files is [5], not a list of names"),
    ],
)
def test_files_that_a_file_names_are_held_to_the_same(model, named, error, said):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fast_tokenizer_files": [named]}))
    with refused(error, said, directory=model):
        open_all(model)


def test_a_version_that_is_named_is_read_and_copied_as_transformers_reads_it(model, tmp_path):
    path = model / "tokenizer_config.json"
    named = {"fast_tokenizer_files": ["tokenizer.4.0.json", "tokenizer.json"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    described = json.loads((model / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.4.0.json").write_text(json.dumps(described))
    copy_tokenizer(tokenizer_files(model), tmp_path)
    shutil.copy(model / "config.json", tmp_path)
    for place in (model, tmp_path):
        theirs = AutoTokenizer.from_pretrained(place)
        assert load_tokenizer(place)("A B")["input_ids"] == theirs("a b")["input_ids"]


@pytest.mark.parametrize(
    "template",
    [5, 1.5, True, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"a": 1}],
)
def test_a_chat_template_that_is_no_text_is_refused_before_torch(model, template):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    said = "tokenizer_config.json: chat_template is ", "correct or remove it"
    with refused(TokenizerError, *said, directory=model):
        open_all(model)
    with refused(TokenizerError, *said, directory=model):
        load_tokenizer(model)


@pytest.mark.parametrize(
    "template", ["{{ messages }}", None, [{"name": "default", "template": "x"}]]
)
def test_a_chat_template_that_is_text_is_taken(model, template):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    open_all(model)
    load_tokenizer(model)


def test_transformers_sees_no_file_that_is_not_listed(model):
    """A name that some class of transformers looks for is not there for it, whatever it holds."""
    names = ("tekken.json", "vocab.txt", "spiece.model", "tiktoken.model", "config.9.9.9.json")
    for name in (*names, "adapter_config.json", "processor_config.json"):
        os.mkfifo(model / name)  # opened, it would wait for ever
    open_base(BaseConfig(model=str(model)))


def test_a_model_is_opened_through_the_same_list(model):
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        (model / name).write_bytes(POINTER)
        with pytest.raises((ModelError, TokenizerError), match=f"{name}: is a git-lfs pointer"):
            open_base(BaseConfig(model=str(model)))


def test_the_tokenizer_says_where_it_is_from_and_leaves_nothing_behind(
    model, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    before = tree_hash(model)
    tokenizer = load_tokenizer(model)
    assert tokenizer.name_or_path == str(model)
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    assert not list((tmp_path / "scratch").iterdir())
    assert tree_hash(model) == before
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("a b") == tokenizer("a b")


def test_copies_are_of_every_listed_file(model, tmp_path):
    copy_tokenizer(tokenizer_files(model), tmp_path / "run")
    assert tokenizer_files(tmp_path / "run").keys() == tokenizer_files(model).keys()
    assert f"{TEMPLATES}/tool_use.jinja" in tokenizer_files(model)


def test_what_is_absent_is_none(tmp_path):
    assert find(tmp_path, "generation_config.json") is None


def replaced(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = {
    "ten for one, ten times": [replaced({"String": "a"}, "a" * 10)] * 10,
    "nested": [{"type": "Sequence", "normalizers": [replaced({"String": "a"}, "aaa")] * 4}],
    "a regex": [replaced({"Regex": "[a-z]"}, "x" * 40)],
    "between any two": [replaced({"Regex": "x*"}, "y" * 33)],
    "put before": [{"type": "Prepend", "prepend": "▁" * 10_000}],
}


@pytest.mark.parametrize("steps", GROWING.values(), ids=GROWING)
def test_a_tokenizer_that_multiplies_a_text_is_not_loaded(model, steps):
    path = model / "tokenizer.json"
    described = json.loads(path.read_text())
    described["normalizer"] = {"type": "Sequence", "normalizers": steps}
    path.write_text(json.dumps(described))
    with refused(
        TokenizerError, "its normalizer can make a text", "times as long", directory=model
    ):
        load_tokenizer(model)


@pytest.mark.parametrize("added", [True, 5, "x", {"content": 5}])
def test_added_tokens_that_are_no_list_are_named(model, added):
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens": added}))
    with refused(TokenizerError, "tokenizer.json", directory=model):
        load_tokenizer(model)


def test_what_real_tokenizers_put_in_a_text_is_no_growth(model, data_dir):
    usual = [
        {"type": "Prepend", "prepend": "▁"},
        replaced({"String": " "}, "▁"),
        replaced({"String": "``"}, '"'),
        replaced({"Regex": " {2,}"}, " "),
        {"type": "NFKC"},
    ]
    path = model / "tokenizer.json"
    described = json.loads(path.read_text())
    described["normalizer"] = {"type": "Sequence", "normalizers": usual}
    path.write_text(json.dumps(described))
    load_tokenizer(model)
    load_tokenizer(data_dir / "models" / "stories260K")


def test_a_token_of_a_megabyte_is_not_loaded(model):
    path = model / "tokenizer.json"
    described = json.loads(path.read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "content": "x" * 2**20})
    path.write_text(json.dumps(described))
    with refused(TokenizerError, "has a token of 1048576 characters", directory=model):
        load_tokenizer(model)
