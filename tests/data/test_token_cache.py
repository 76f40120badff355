"""Tokens on disk: the same rows, found again, never from something else, in flat memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizer import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config.data import DataConfig
from qlora_kit.data import encode as rows_to_tokens
from qlora_kit.data import token_cache as cache_module
from qlora_kit.data.batch import lengths_of
from qlora_kit.data.chat_template import use_template
from qlora_kit.data.encode import encode, encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import load_rows
from qlora_kit.data.token_cache import cache_directory
from qlora_kit.data.tokens import Skipped
from qlora_kit.errors import DataError


@pytest.fixture
def encodings(monkeypatch):
    """How often rows were encoded and not found."""
    calls = []
    original = rows_to_tokens._outcomes
    monkeypatch.setattr(rows_to_tokens, "_outcomes", lambda *a: calls.append(1) or original(*a))
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


def altered(entry, name, change):
    """Write a column anew, with the checksums that belong to it: only its meaning is wrong."""
    facts = json.loads((entry / "facts.json").read_text())
    facts.pop("sum")
    if name == "facts.json":
        change(facts)
    else:
        column = np.fromfile(entry / name, np.int32)
        changed = change(column)
        (column if changed is None else changed).tofile(entry / name)
        facts["checksums"][name] = zlib.crc32((entry / name).read_bytes())
    facts["sum"] = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    (entry / "facts.json").write_text(json.dumps(facts))


def to(index, value):
    def change(column):
        column[index] = value

    return change


MEANINGS = {
    "an id that the tokenizer lacks": ("tokens", to(3, 100_000)),
    "an id that it lacks, not trained on": ("tokens", to(0, ~100_000)),
    "another number of trained tokens": ("tokens", to(1, ~3)),
    "a row that is too long": ("lengths", to(0, 41)),
    "a row of nothing": ("lengths", to(0, 0)),
    "a row of less than nothing": ("lengths", to(0, -1)),
    "lengths that do not add up": ("lengths", to(0, 3)),
    "fewer lengths": ("lengths", lambda column: column[:-1]),
    "fewer digests": ("digests", lambda column: column[:-2]),
    "half a token more": ("tokens", lambda column: np.append(column.view(np.int16), np.int16(1))),
    "another key": ("facts.json", lambda facts: facts.update(key="0" * 40)),
    "a count below zero": ("facts.json", lambda facts: facts.update(cut_tokens=-1)),
    "a count that is text": ("facts.json", lambda facts: facts.update(duplicates="1")),
    "a fact that is missing": ("facts.json", lambda facts: facts.pop("unused")),
    "names of no rows": ("facts.json", lambda facts: facts.update(skipped={"x": 1})),
    "rows of nowhere": ("facts.json", lambda facts: facts.update(lost=[["a", 1]])),
}


@pytest.mark.parametrize("meaning", MEANINGS)
def test_what_an_entry_means_is_checked_too(tmp_path, encodings, meaning):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(50)), chat_tokenizer()
    expected = contents(encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c"))
    (entry,) = (tmp_path / "c").iterdir()
    altered(entry, "facts.json", lambda facts: None)
    encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    assert len(encodings) == 1  # what is altered to the same counts
    altered(entry, *MEANINGS[meaning])
    assert contents(encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")) == expected
    assert len(encodings) == 2


def owned(path):
    for one in (path, *path.rglob("*")):
        os.chown(one, 65534, 65534)


def piped(entry):
    (entry / "facts.json").unlink()
    os.mkfifo(entry / "facts.json")


def linked(entry):
    entry.rename(entry.parent / "elsewhere")
    entry.symlink_to("elsewhere")


WRITERS = {
    "another user's": owned,
    "a directory that the group may write to": lambda entry: entry.chmod(0o770),
    "a file that all may write to": lambda entry: (entry / "tokens").chmod(0o606),
    "a link": linked,
    "a pipe": piped,
}


@pytest.mark.parametrize("who", WRITERS)
def test_what_somebody_else_could_have_written_is_not_used(tmp_path, encodings, who):
    if who == "another user's" and os.geteuid():
        pytest.skip("only root can give a file away")
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(50)), chat_tokenizer()
    before = os.umask(0o002)  # as where every user has a group: our own files are used
    try:
        for _ in range(2):
            encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    finally:
        os.umask(before)
    assert len(encodings) == 1
    (entry,) = (tmp_path / "c").iterdir()
    WRITERS[who](entry)
    for _ in range(2):
        encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    assert len(encodings) == 2


PLACES = {
    "under a file": lambda folder: ((folder / "file").write_text("") and None) or folder / "file/c",
    "a file": lambda folder: write(folder / "c", pairs(1)),
    "a loop of links": lambda folder: (folder / "c").symlink_to("c") or folder / "c",
    "a file system without files": lambda folder: Path("/proc/c"),
    "a full device": lambda folder: Path("/dev/full"),
    "too long a name": lambda folder: folder / ("x" * 300),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, place):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(5)), chat_tokenizer()
    expected = contents(encode_rows(table(path), tokenizer, 40))
    with pytest.warns(UserWarning, match="the tokens are not kept in"):
        found = encode_rows(table(path), tokenizer, 40, cache=PLACES[place](tmp_path))
    assert contents(found) == expected


def test_without_any_folder_the_tokens_stay_in_memory(tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(50)), chat_tokenizer()
    expected = encode_rows(table(path), tokenizer, 40)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"the tokens") as said:
        found = encode_rows(table(path), tokenizer, 40, cache=tmp_path / "file" / "c")
    assert ["not kept" in str(one.message) for one in said] == [True, False]
    assert "the tokens stay in memory" in str(said[1].message)
    assert contents(found) == contents(expected)
    assert found.duplicates == expected.duplicates
    assert (found.rows.digests == expected.rows.digests).all()
    assert found.rows[3:5] == expected.rows[3:5]


def test_a_disk_that_fills_is_done_without(tmp_path):
    path, tokenizer = write(tmp_path / "rows.jsonl", pairs(3000)), chat_tokenizer()
    expected = contents(encode_rows(table(path), tokenizer, 40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.warns(UserWarning, match=r"File too large"):
            found = encode_rows(table(path), tokenizer, 40, cache=tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert contents(found) == expected
    assert list((tmp_path / "c").iterdir()) == []


def test_rows_that_cannot_be_read_are_no_fault_of_the_cache(tmp_path, monkeypatch):
    path, calls = write(tmp_path / "rows.jsonl", pairs(5)), []

    def fail(*arguments):
        calls.append(1)
        raise OSError(5, "Input/output error", str(path))
        yield

    rows = table(path)
    monkeypatch.setattr(rows_to_tokens, "_outcomes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        encode_rows(rows, chat_tokenizer(), 40, cache=tmp_path / "c")
    assert calls == [1]


def test_what_killed_processes_left_goes(tmp_path):
    (tmp_path / "c" / f".{'a' * 40}.99999999.tmp").mkdir(parents=True)
    path = write(tmp_path / "rows.jsonl", pairs(5))
    encode_rows(table(path), chat_tokenizer(), 40, cache=tmp_path / "c")
    assert [len(entry.name) for entry in (tmp_path / "c").iterdir()] == [40]


def test_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch, encodings):
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
    assert str(cache_directory(None)) == "/somewhere/qlora_kit/tokens"
    monkeypatch.setenv("HOME", "/home/of/mine")
    for home in ("", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert str(cache_directory(None)) == "/home/of/mine/.cache/qlora_kit/tokens"
    # A relative one is to be ignored, says the standard; and some users have no home.
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_directory(None) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert cache_directory(None) is None


MEASURE = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from qlora_kit.config.data import DataConfig
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.rows import load_rows
from qlora_kit.data.schedule import StepSchedule

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

# Words of 25 characters that are one token each, so that it is not the tokenizer that is timed.
backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "w" * 24: 2}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer, peaks = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), []
for name in sys.argv[2:]:
    rows = load_rows(DataConfig(data=name, eval_fraction=0), 0)
    encoded = encode_rows(rows.train, tokenizer, 4096, cache=Path(sys.argv[1]))
    num_steps, tokens = len(encoded.rows) // 8, 0
    for (batch,) in StepSchedule(rows=encoded.rows, batch_size=8, num_steps=num_steps, seed=0):
        tokens += sum(batch["lengths"])
    assert tokens == encoded.tokens, (tokens, encoded.tokens)
    peaks.append(resident())
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    # 20 MB, then 80 MB, read, encoded, kept and gone through in one process; VmHWM is in KiB.
    # The larger file's tokens alone are 13 MB, which the process maps and goes through: 10 MB more.
    line = json.dumps({"text": ("w" * 24 + " ") * 400}) + "\n"
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    for path, size in ((small, 20_000_000), (large, 80_000_000)):
        path.write_text(line * (size // len(line) // 8 * 8))
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "c")]
    done = subprocess.run(
        [*arguments, str(small), str(large)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024
