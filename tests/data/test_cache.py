"""Tokens on disk: the same rows, found again, never from something else, in flat memory."""

import json
import subprocess
import sys

import pytest
from chat_tokenizer import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config import DataConfig
from qlora_kit.data import cache as cache_module
from qlora_kit.data import prompt
from qlora_kit.data.batch import lengths_of
from qlora_kit.data.cache import default_cache
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.prompt import encode, encode_rows
from qlora_kit.data.read import load_rows
from qlora_kit.data.template import use_template
from qlora_kit.data.tokens import Skipped
from qlora_kit.errors import DataError


@pytest.fixture
def encodings(monkeypatch):
    """How often rows were encoded and not found."""
    calls = []
    original = prompt._outcomes
    monkeypatch.setattr(prompt, "_outcomes", lambda *a: calls.append(1) or original(*a))
    return calls


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count, letter="h"):
    return [{"prompt": letter * (n % 7), "completion": f"he {n}"} for n in range(count)]


def table(path, **options):
    return load_rows(DataConfig(data=str(path), eval_fraction=0, **options), 0).train


def contents(encoded):
    return [(row.input_ids, row.labels) for row in encoded.rows]


words = st.text(st.sampled_from("heo nl:<|>é🙂"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=30), st.integers(8, 40))
def test_what_is_on_disk_is_what_was_encoded(tmp_path_factory, texts, max_length):
    folder = tmp_path_factory.mktemp("cache")
    tokenizer = chat_tokenizer()
    path = write(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in texts])
    rows = table(path)
    expected = [
        (one.input_ids, one.labels)
        for row in rows
        if not isinstance(result := encode(row, tokenizer, max_length), Skipped)
        for one in result
    ]
    if len(expected) < len(texts) / 2 or not expected:
        with pytest.raises(DataError):
            encode_rows(rows, tokenizer, max_length, cache=folder / "c")
        return
    for cache in (None, folder / "c", folder / "c"):
        found = encode_rows(rows, tokenizer, max_length, cache=cache)
        assert contents(found) == expected
        assert contents(found) == expected[:]
        assert len(found.rows) == len(expected)
        assert lengths_of(found.rows).tolist() == [len(ids) for ids, _ in expected]
        assert found.rows[-1] == found.rows[len(expected) - 1]
        assert [row.input_ids for row in found.rows[1:3]] == [ids for ids, _ in expected[1:3]]
        with pytest.raises(IndexError):
            found.rows[len(expected)]
        assert found.tokens == sum(len(ids) for ids, _ in expected)


def test_rows_are_found_again_and_not_encoded(tmp_path, encodings):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(50)), chat_tokenizer()
    first = encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    again = encode_rows(table(path), chat_tokenizer(), 40, cache=tmp_path / "c")
    assert len(encodings) == 1
    assert contents(first) == contents(again)
    assert (first.skipped, first.lost, first.duplicates) == (
        again.skipped,
        again.lost,
        again.duplicates,
    )


def test_anything_else_is_encoded_anew(tmp_path, encodings):
    cache = tmp_path / "c"
    path = write(tmp_path / "rows.jsonl", pairs(50))

    def count(rows, tokenizer=None, max_length=40, whole=False):
        before = len(encodings)
        encode_rows(
            rows, tokenizer or chat_tokenizer(), max_length, EncodeRules(whole), cache=cache
        )
        return len(encodings) - before

    assert count(table(path)) == 1
    assert count(table(path), max_length=41) == 1
    assert count(table(path), whole=True) == 1
    assert count(table(path, columns="prompt=completion,completion=prompt")) == 1
    templated = chat_tokenizer()
    use_template(templated, "plain")
    assert count(table(path), templated) == 1
    assert count(table(path), chat_tokenizer(pad="</s>")) == 1
    assert count(table(path), chat_tokenizer(adds_bos=False)) == 1
    shares = [load_rows(DataConfig(data=str(path), eval_fraction=0.5), seed) for seed in (0, 1)]
    for rows in shares:
        assert count(rows.train) == 1
        assert count(rows.evaluation) == 1
        assert count(rows.train) == 0
    write(path, pairs(50, "o"))
    assert count(table(path)) == 1
    assert count(table(path)) == 0


@pytest.mark.parametrize("name", ["tokens", "lengths", "digests", "facts.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped"])
def test_a_damaged_entry_is_made_again(tmp_path, encodings, name, damage):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(50)), chat_tokenizer()
    expected = contents(encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c"))
    (entry,) = (tmp_path / "c").iterdir()
    raw = (entry / name).read_bytes()
    if damage == "gone":
        (entry / name).unlink()
    elif damage == "flipped":
        (entry / name).write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    else:
        (entry / name).write_bytes(b"" if damage == "empty" else raw[:-1])
    found = encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    assert contents(found) == expected
    assert len(encodings) == 2
    assert [item.name for item in (tmp_path / "c").iterdir()] == [entry.name]


def test_an_error_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*pairs(5), {"prompt": 5}])
    with pytest.raises(DataError, match=r"rows.jsonl:6"):
        encode_rows(table(path), chat_tokenizer(), 40, cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "rows.jsonl", pairs(5))
    found = encode_rows(table(path), chat_tokenizer(), 40, cache=tmp_path / "file" / "c")
    assert len(found.rows) == 5


def test_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch, encodings):
    import os

    cache, tokenizer = tmp_path / "c", chat_tokenizer()
    paths = [write(tmp_path / f"{n}.jsonl", pairs(50, "heo"[n])) for n in range(3)]
    for number, path in enumerate(paths):
        encode_rows(table(path), tokenizer, 40, cache=cache)
        newest = max(cache.iterdir(), key=lambda entry: entry.stat().st_mtime)
        os.utime(newest, (number, number))
    # The first is used again; then there is room for two and a half.
    encode_rows(table(paths[0]), tokenizer, 40, cache=cache)
    size = sum(f.stat().st_size for f in newest.iterdir())
    monkeypatch.setattr(cache_module, "CACHE_BYTES", int(2.5 * size))
    other = write(tmp_path / "3.jsonl", pairs(50, "n"))
    encode_rows(table(other), tokenizer, 40, cache=cache)
    assert len(list(cache.iterdir())) == 2
    before = len(encodings)
    for path in (paths[0], other):
        encode_rows(table(path), tokenizer, 40, cache=cache)
    assert len(encodings) == before


def test_the_default_cache_is_where_caches_are(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(default_cache()) == "/somewhere/qlora_kit/tokens"


MEASURE = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from qlora_kit.config import DataConfig
from qlora_kit.data.batch import steps
from qlora_kit.data.prompt import encode_rows
from qlora_kit.data.read import load_rows

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

# Words of 25 characters that are one token each, so that it is not the tokenizer that is timed.
backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "w" * 24: 2}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer, peaks = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), []
for name in sys.argv[2:]:
    rows = load_rows(DataConfig(data=name, eval_fraction=0), 0)
    encoded = encode_rows(rows.train, tokenizer, 4096, cache=Path(sys.argv[1]))
    options = dict(batch_size=8, accumulation=1, seed=0, pad_id=0)
    tokens = 0
    for (batch,) in steps(encoded.rows, num_steps=len(encoded.rows) // 8, **options):
        tokens += sum(batch["lengths"])
    assert tokens == encoded.tokens, (tokens, encoded.tokens)
    peaks.append(resident())
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    # D8: 50 MB, then 200 MB, read, encoded, kept and gone through in one process; VmHWM is in KiB.
    # The larger file's tokens alone are 32 MB, which the process maps and goes through.
    line = json.dumps({"text": ("w" * 24 + " ") * 400}) + "\n"
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    for path, size in ((small, 50_000_000), (large, 200_000_000)):
        path.write_text(line * (size // len(line) // 8 * 8))
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "c")]
    done = subprocess.run(
        [*arguments, str(small), str(large)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024
