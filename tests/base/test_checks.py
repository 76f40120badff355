"""Laws of hostile model directories: what headers, JSON and paths show is refused at once.

Every case is a real checkpoint with one thing wrong. `refused` also holds each to its class, its
exit code, two seconds, and to leaving the disk as it was.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from families import edit_config, refused, save_checkpoint
from pickles import Payload
from processor import processor_s

from qlora_kit.base.checks import check_architecture, read_config
from qlora_kit.base.open import open_base
from qlora_kit.base.safetensors_file import read_entries, read_header
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import ModelError, TokenizerError, UnsafeInputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "single")
    save_checkpoint(root / "sharded", shard_size="150KB")
    # What a process pays once (imports) is not part of the time that an answer takes.
    open_base(BaseConfig(str(root / "single")))
    return root


@pytest.fixture
def model(originals, tmp_path):
    return shutil.copytree(originals / "single", tmp_path / "model")


@pytest.fixture
def sharded(originals, tmp_path):
    return shutil.copytree(originals / "sharded", tmp_path / "model")


def check(directory):
    open_base(BaseConfig(str(directory)))


# Directories and JSON


def test_a_path_that_is_no_model_directory_is_said_to_be_what_it_is(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("missing", "no such directory"),
        ("file", "is a file"),
        ("empty", "is empty"),
    ):
        with refused(ModelError, name, said, directory=tmp_path):
            check(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "has no causal language model of model_type None"),
        (b'{"model_type": "llama", "hidden', "config.json:1: not JSON: Unterminated string"),
        (b"[1, 2]", "holds list, not an object"),
        (b"null", "holds NoneType, not an object"),
        ('{"model_type": "llama"}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b"", "config.json:1: not JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        # What json still reads, and whatever goes down into it does not.
        (b'{"model_type": "llama", "a": ' + b"[" * 900 + b"]" * 900 + b"}", "64 levels deep"),
        (b'{"model_type": "llama", "vocab_size": ' + b"9" * 400 + b"}", "vocab_size is 999"),
        (b'{"model_type": "llama", "vocab_size": NaN}', "holds NaN, which is no finite number"),
        (
            b'{"model_type": "llama", "max_position_embeddings": -5}',
            "embeddings is -5, not a whole number from 1",
        ),
        (
            b'{"model_type": "llama", "max_position_embeddings": 0}',
            "embeddings is 0, not a whole number from 1",
        ),
        (
            b'{"model_type": "llama", "num_attention_heads": 0}',
            "heads is 0, not a whole number from 1 to 512",
        ),
        (b'{"model_type": "llama", "quantization_config": "bitsandbytes"}', "is not supported"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "a number too long"),
        (b'{"model_type": "no_such_family"}', "no causal language model of model_type 'no_such"),
        (b'{"model_type": ["llama"]}', "no causal language model of model_type ['llama']"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_a_broken_config_is_named_with_the_place(model, content, said):
    (model / "config.json").write_bytes(content)
    with refused(ModelError, "config.json", said, directory=model):
        check(model)


def test_a_config_of_two_hundred_megabytes_is_not_read(model):
    os.truncate(model / "config.json", 200_000_000)
    with refused(ModelError, "config.json: has 200000000 bytes", directory=model):
        check(model)


def test_a_missing_config_is_named(model):
    (model / "config.json").unlink()
    with refused(ModelError, "config.json: no such file", directory=model):
        check(model)


def test_python_files_of_a_model_are_never_run(model, tmp_path):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\n"
    (model / "modeling_own.py").write_text(code)
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_config(model, auto_map=own)
    with refused(UnsafeInputError, "config.json: auto_map", "never run", directory=model):
        check(model)
    # Without a file to run, the family's own class is used; an unknown family has none.
    (model / "modeling_own.py").unlink()
    check(model)
    edit_config(model, model_type="own")
    with refused(UnsafeInputError, "auto_map", directory=model):
        check(model)
    assert not canary.exists()


def test_python_files_of_a_tokenizer_are_never_run(model, tmp_path):
    canary = tmp_path / "canary"
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    path = model / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with refused(UnsafeInputError, "tokenizer_config.json: auto_map", directory=model):
        check(model)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["weights", "other_keys", "payload"])
def test_pickles_are_refused_and_not_opened(model, tmp_path, kind):
    (model / WEIGHTS).unlink()
    content = {"model.norm.weight": torch.ones(64)} if kind == "weights" else {"x": 1}
    torch.save(content, model / "pytorch_model.bin")
    if kind == "payload":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    with refused(UnsafeInputError, "pytorch_model.bin", "convert it", directory=model):
        check(model)
    assert not (tmp_path / "canary").exists()


def test_a_directory_without_weights_is_named(model):
    (model / WEIGHTS).unlink()
    with refused(ModelError, f"holds neither {WEIGHTS} nor {INDEX}", directory=model):
        check(model)


# Paths


@pytest.mark.parametrize(
    "target",
    ["../x.safetensors", "/etc/hosts", "a/../../x", "/dev/zero", "", ".", "a\0b", "x" * 5000],
)
def test_an_index_may_not_point_out_of_its_directory(sharded, target):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index, target)}))
    with refused(UnsafeInputError, directory=sharded):
        check(sharded)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "merges.txt"])
def test_a_link_out_of_the_directory_is_not_followed(model, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes((model / name).read_bytes() if (model / name).exists() else b"")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    with refused(UnsafeInputError, name, "outside the model directory", directory=model):
        check(model)


def test_links_within_the_directory_and_in_the_hub_cache_are_followed(model, tmp_path):
    (model / WEIGHTS).rename(model / "real.safetensors")
    (model / WEIGHTS).symlink_to("real.safetensors")
    check(model)
    # As the hub's cache lies: snapshots/<commit>/<name> links to ../../blobs/<hash>.
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    check(snapshot)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_a_pipe_is_not_opened(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with refused(UnsafeInputError, name, "not a regular file", directory=model):
        check(model)


def test_a_loop_of_links_is_refused(model):
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises((UnsafeInputError, ModelError)):
        check(model)


# The index


def test_a_missing_shard_is_named_with_what_it_held(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    lost = sorted(set(index.values()))[1]
    held = sum(file == lost for file in index.values())
    (sharded / lost).unlink()
    with refused(ModelError, lost, f"puts {held} tensors into it", directory=sharded):
        check(sharded)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
        ({}, "lists no tensor"),
    ],
)
def test_an_index_without_a_map_is_named(sharded, weight_map, said):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with refused(ModelError, INDEX, said, directory=sharded):
        check(sharded)


def test_an_index_that_disagrees_with_the_shards_is_named(sharded):
    path = sharded / INDEX
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    renamed = {n: f for n, f in index["weight_map"].items() if n != name} | {"other": file}
    path.write_text(json.dumps({"weight_map": renamed}))
    with refused(ModelError, file, "lacks other of the index", directory=sharded):
        check(sharded)
    del renamed["other"]
    path.write_text(json.dumps({"weight_map": renamed}))
    with refused(ModelError, name, "the index does not put there", directory=sharded):
        check(sharded)


# Headers


def rewrite(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", count) + text + data)


def tensor(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "length_zero": (b"", b"", 0, "header of 0 bytes"),
    "length_huge": (b"{}", b"", 2**63, "header of 9223372036854775808 bytes"),
    "length_beyond_file": (b"{}", b"", 3, "header of 3 bytes in a file of 10"),
    "not_json": (b"{x", b"", None, "header: Expecting"),
    "not_utf8": (b'{"\xff\xfe": 1}', b"", None, "header: 'utf-8'"),
    "deep": (b"[" * 100_000, b"", None, "header: "),
    "no_object": (b"[]", b"", None, "header is no object"),
    "edge_of_the_stack": (
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"",
        None,
        "nested too deeply",
    ),
    "duplicate": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
        b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"x",
        None,
        "the key 'a' stands twice",
    ),
    "overlap": (
        {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])},
        bytes(12),
        None,
        "'b' overlaps another tensor",
    ),
    "hole": ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12), None, "follows a hole"),
    "data_short": ({"a": tensor(0, 8, [2])}, bytes(7), None, "tensors end at byte"),
    "data_long": ({"a": tensor(0, 8, [2])}, bytes(9), None, "tensors end at byte"),
    "negative_shape": ({"a": tensor(0, 8, [-2])}, bytes(8), None, "bad shape [-2]"),
    "overflow_shape": (
        {"a": tensor(0, 8, [2**32, 2**32])},
        bytes(8),
        None,
        "8 bytes for 73786976294838206464",
    ),
    "fraction_shape": ({"a": tensor(0, 8, [2.0])}, bytes(8), None, "bad shape"),
    "true_shape": ({"a": tensor(0, 4, [True])}, bytes(4), None, "bad shape"),
    "negative_offset": ({"a": tensor(-8, 0, [2])}, bytes(8), None, "bad offsets"),
    "one_offset": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        bytes(8),
        None,
        "bad offsets",
    ),
    "unknown_dtype": ({"a": tensor(0, 8, [2], "F12")}, bytes(8), None, "unknown dtype 'F12'"),
    "listed_dtype": ({"a": tensor(0, 8, [2], ["F32"])}, bytes(8), None, "unknown dtype"),
    "no_description": ({"a": 3}, b"", None, "no description"),
    "empty_description": ({"a": {}}, b"", None, "unknown dtype"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_corrupt_header_is_named_with_the_reason(model, case):
    header, data, length, said = HEADERS[case]
    rewrite(model / WEIGHTS, header, data, length)
    with refused(ModelError, f"{WEIGHTS}: corrupt safetensors: ", said, directory=model):
        check(model)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_file_is_corrupt(model, cut):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:-cut])
    with refused(ModelError, "corrupt safetensors: tensors end at byte", directory=model):
        check(model)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_file_without_room_for_a_header_is_corrupt(model, size):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with refused(ModelError, "corrupt safetensors: header of", directory=model):
        check(model)


def test_headers_are_read_as_the_safetensors_library_reads_them(originals):
    from safetensors import safe_open

    path = originals / "single" / WEIGHTS
    entries = read_header(path)
    with safe_open(path, "pt") as file:
        assert set(entries) == set(file.keys())
        for name, entry in entries.items():
            assert list(entry.shape) == file.get_slice(name).get_shape()
            raw = path.read_bytes()[entry.start : entry.end]
            assert torch.equal(
                torch.frombuffer(bytearray(raw), dtype=entry.torch_dtype).view(entry.shape),
                file.get_tensor(name),
            )


@pytest.mark.parametrize(
    ("per_layer", "said"), [(10, "10000 layers"), (50_000, "holds 100000 tensors")]
)
def test_a_hundred_thousand_tensors_are_judged_in_time(model, per_layer, said):
    """By the number of layers, and where that fits by every name; the data is a hole of 100 MB."""
    header = {
        f"model.layers.{i // per_layer}.junk.{i}": tensor(1024 * i, 1024 * i + 1024, [256])
        for i in range(10**5)
    }
    rewrite(model / WEIGHTS, header)
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size + 1024 * 10**5)
    text, began = json.dumps(header), processor_s()
    json.loads(text)
    # The measure is what `json` takes for the header here and now: the checks took 6 times that.
    with refused(ModelError, said, directory=model, seconds=20 * (processor_s() - began)):
        check(model)


def test_the_architecture_is_compared_by_shape_and_name(originals):
    entries = read_entries(originals / "single")
    expected = {name: torch.Size(entry.shape) for name, entry in entries.items()}
    check_architecture(entries, expected, {}, originals)
    # A tied name may be absent, a computed table may be present.
    fewer = {name: entry for name, entry in entries.items() if name != "lm_head.weight"}
    check_architecture(fewer, expected, {"lm_head.weight": "model.embed_tokens.weight"}, originals)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        check_architecture(fewer, expected, {}, originals)
    table = {
        **entries,
        "model.layers.0.self_attn.rotary_emb.inv_freq": entries["model.norm.weight"],
    }
    check_architecture(table, expected, {}, originals)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [1.5, "2", [None], {"a": 1}, True, [[2]], 10**9, [2] * 5000])
def test_a_generation_config_without_tokens_is_named(model, key, value):
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with refused(ModelError, f"generation_config.json: {key} is", "not a token", directory=model):
        check(model)
    path.write_text(json.dumps({"eos_token_id": [2, 1], "pad_token_id": None}))
    check(model)


# Tokenizers


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (2**31, "tokenizer.json: has a token with the id 2147483648"),
        (2**24, "16777217 tokens, 264 embedding rows"),
        (264, "265 tokens, 264 embedding rows"),
        (263, None),
    ],
)
def test_an_id_that_the_model_does_not_have_is_named(model, number, said):
    """Where such a vocabulary was written, tokenizers asked for memory up to it and aborted."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["\u0133"] = number
    path.write_text(json.dumps(tokenizer))
    if said is None:
        check(model)
        return
    with refused(TokenizerError, said, directory=model):
        check(model)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer.json", {"decoder": {"type": "Sequence", "decoders": [3]}}),
    ],
)
def test_a_tokenizer_that_fails_in_use_is_named(model, file, changes):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with refused(TokenizerError, "tokenizer.json: cannot be read as a", directory=model):
        check(model)


def test_a_sentencepiece_model_alone_says_what_it_needs(model):
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("it is installed")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with refused(TokenizerError, "tokenizer.model", "install sentencepiece", directory=model):
        check(model)


def test_a_missing_tokenizer_names_the_files(model):
    (model / "tokenizer.json").unlink()
    with refused(TokenizerError, "tokenizer.json, tokenizer.model, vocab.json", directory=model):
        check(model)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b'{"version": "1.0", "mod', b"[]", b"", b"\xff\xfe{\x00"])
def test_a_broken_tokenizer_is_named(model, file, content):
    (model / file).write_bytes(content)
    with refused(TokenizerError, file, directory=model):
        check(model)


@pytest.mark.parametrize(
    ("name", "value"), [("attention_dropout", "x"), ("num_labels", 10**21), ("tokenizer_class", 5)]
)
def test_the_tokenizer_depends_on_no_number_of_the_config(model, name, value):
    """transformers asks config.json for the tokenizer's class, and would list so many labels."""
    edit_config(model, **{name: value})
    load_tokenizer(model)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"type": "NoSuch", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": [], "merges": 3}},
        {"model": None},
        {},
        {"added_tokens": [{"id": -1}], "model": {"type": "WordLevel", "vocab": {"a": 0}}},
    ],
)
def test_a_tokenizer_of_the_wrong_kind_is_named(model, content):
    (model / "tokenizer.json").write_text(json.dumps(content))
    with refused(TokenizerError, "tokenizer.json", directory=model):
        check(model)


def test_a_large_vocabulary_is_read(model):
    # Gemma's tokenizer.json has 17 MB, more than a config may have.
    path = model / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" " * 20_000_000)
    check(model)


def test_read_config_gives_what_the_file_says(originals):
    said = json.loads((originals / "single" / "config.json").read_text())
    assert read_config(originals / "single") == said
