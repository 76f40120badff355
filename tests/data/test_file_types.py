"""What a name means: several files, patterns, shards, saved data sets; and hostile tables."""

import contextlib
import gzip
import json

import pytest

from qlora_kit.config.data import DataConfig
from qlora_kit.data import source, tables
from qlora_kit.data.records import count, records
from qlora_kit.data.rows import load_rows
from qlora_kit.data.source import files, local_files
from qlora_kit.errors import ConfigError, DataError, UnsafeInputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def put(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(data, **options):
    rows = load_rows(DataConfig(data=str(data), eval_fraction=0, **options), 0)
    return [(row.where, row.content["text"]) for row in rows.train]


def texts(data, **options):
    return [text for _, text in read(data, **options)]


# --- several files --------------------------------------------------------------------------------


def test_several_files_are_read_one_after_the_other(tmp_path):
    one, two = put(tmp_path / "a.jsonl", "1", "2"), put(tmp_path / "b.jsonl", "3")
    table = tmp_path / "c.csv"
    table.write_text("text\n4\n")
    every = [(f"{one}:1", "1"), (f"{one}:2", "2"), (f"{two}:1", "3"), (f"{table}:2", "4")]
    assert read(f"{one},{two},{table}") == every
    assert read(f"{two}, {one}") == [every[2], *every[:2]]
    assert read(tmp_path / "*.jsonl") == every[:3]
    assert read(f"{tmp_path}/[ab].jsonl,{table}") == every
    # As a list in Python and in a config file.
    config = DataConfig(data=[str(one), str(table)], eval_fraction=0)
    assert [row.content["text"] for row in load_rows(config, 0).train] == ["1", "2", "4"]
    assert set(local_files(f"{one},{tmp_path}/b*")) == {one, two}


def test_a_share_of_several_files_is_drawn_of_all(tmp_path):
    names = [put(tmp_path / f"{n}.jsonl", *(f"{n} {m}" for m in range(10))) for n in range(3)]
    config = DataConfig(data=",".join(map(str, names)), eval_fraction=0.5)
    rows = load_rows(config, 7)
    parts = [[row.content["text"] for row in part] for part in (rows.train, rows.evaluation)]
    assert sorted(parts[0] + parts[1]) == [f"{n} {m}" for n in range(3) for m in range(10)]
    assert [len(part) for part in parts] == [15, 15]
    assert rows.train.fingerprint != rows.evaluation.fingerprint
    put(names[2], "other")
    assert load_rows(config, 7).train.fingerprint != rows.train.fingerprint


def test_a_name_with_a_comma_or_a_bracket_that_is_there_is_that_file(tmp_path):
    for name in ("a,b.jsonl", "a[1].jsonl", "what?.jsonl"):
        path = put(tmp_path / name, name)
        assert read(path) == [(f"{path}:1", name)]
    assert texts(f"{tmp_path}/a[[]1].jsonl") == ["a[1].jsonl"]


def test_what_cannot_be_meant_is_refused(tmp_path, monkeypatch):
    one = put(tmp_path / "a.jsonl", "1")
    with pytest.raises(DataError, match="no file fits this pattern"):
        read(tmp_path / "*.csv")
    monkeypatch.setattr(source, "MOST_FILES", 2)
    for name in "bcd":
        (tmp_path / f"{name}.txt").write_text("a")
    with pytest.raises(DataError, match="more than 2 files fit"):
        read(tmp_path / "*.txt")
    with pytest.raises(ConfigError, match=r"a\.jsonl is named twice"):
        read(f"{one},{tmp_path}/*.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read(f"{one},{tmp_path}/gone.jsonl")
    other = put(tmp_path / "b.jsonl", "2")
    with pytest.raises(ConfigError, match="is the file that is trained on"):
        load_rows(DataConfig(data=f"{one},{other}", eval_data=str(one)), 0)
    assert files(str(tmp_path / "*.jsonl")).paths == (one, other)


# --- packed, and in shards ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "txt"])
def test_a_packed_file_is_what_was_packed(tmp_path, suffix):
    content = {"json": '[{"text": "a"}]', "jsonl": '{"text": "a"}'}.get(suffix, "text\na\n")
    path = tmp_path / f"rows.{suffix}"
    path.write_text(content)
    packed = tmp_path / f"packed.{suffix}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    assert texts(packed) == texts(path)


@pytest.mark.parametrize("damage", ["cut", "text", "bits"])
def test_a_packed_file_that_is_broken_is_told(tmp_path, damage):
    raw = gzip.compress(b'{"text": "a"}\n' * 100)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(
        {"cut": raw[:-9], "text": b'{"text": "a"}', "bits": raw[:12] + b"\xff\xff" + raw[14:]}[
            damage
        ]
    )
    with pytest.raises(DataError, match=rf"{path}:1: not gzip"):
        read(path)


def test_a_bomb_of_one_line_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 2**24 + b'"}'))
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match=rf"{path}:1: the line is longer than 16 MiB"):
        read(path)


def test_shards_of_a_directory_are_its_file(tmp_path):
    for number in range(3):
        put(tmp_path / f"train-{number:05d}-of-00003.jsonl", str(number))
    put(tmp_path / "test-00000-of-00001.jsonl", "held out")
    rows = load_rows(DataConfig(data=str(tmp_path)), 0)
    assert [row.content["text"] for row in rows.train] == ["0", "1", "2"]
    assert [row.content["text"] for row in rows.evaluation] == ["held out"]


def test_saved_data_sets_are_read_with_their_shards_and_splits(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [str(n) for n in range(7)]})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=3)
    every = [str(n) for n in range(7)]
    assert texts(tmp_path / "one") == every
    shards = sorted((tmp_path / "one").glob("*.arrow"))
    assert len(shards) == 3
    # A shard, and several of them, by name.
    assert texts(shards[1]) == every[3:5]
    assert texts(tmp_path / "one" / "data-*.arrow") == every
    rows.select([6, 0]).save_to_disk(str(tmp_path / "chosen"))
    assert texts(tmp_path / "chosen") == ["6", "0"]
    both = datasets.DatasetDict({"train": rows, "validation": rows.select(range(2))})
    both.save_to_disk(str(tmp_path / "splits"))
    found = load_rows(DataConfig(data=str(tmp_path / "splits")), 0)
    assert [row.content["text"] for row in found.train] == every
    assert [row.content["text"] for row in found.evaluation] == every[:2]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "no file of the directory"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "no file of the directory"),
        ('{"_data_files": [{"filename": ".."}]}', "no file of the directory"),
        ('{"_data_files": []}', "lists no file"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "no such file"),
        ("[]", "no object"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
    ],
)
def test_a_list_of_shards_that_leaves_its_directory_is_refused(tmp_path, state, reason):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises((DataError, UnsafeInputError), match=reason):
        read(tmp_path)


def test_broken_arrow_is_an_error(tmp_path):
    import pyarrow.ipc

    path = tmp_path / "rows.arrow"
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert texts(path) == ["a", "b"]
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    assert texts(path) == ["a", "b"]
    raw = path.read_bytes()
    # Every byte in turn: what it gives are rows or an error, never a crash.
    for place in range(0, len(raw), 3):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with contextlib.suppress(DataError):
            list(records(path))


# --- tables that stand for more than they are -----------------------------------------------------


def test_a_row_group_is_refused_before_it_is_decompressed(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["a"], "completion": ["x" * (50 * 2**20)]})
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2**14
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(DataError, match=rf"{path}:1: the row group has 1 rows and.*--max_row_size"):
        list(records(path))
    assert count(path) == 1


def test_a_long_row_among_short_ones_is_refused_with_its_number(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = ["a"] * 300 + ["x" * (3 * 2**20)] + ["a"] * 300
    for dictionary in (True, False):
        parquet.write_table(pyarrow.table({"text": rows}), path, use_dictionary=dictionary)
        with pytest.raises(DataError, match=rf"{path}:301: the row is longer than 2 MiB"):
            list(records(path, limit=2 * 2**20))
        assert len(list(records(path, limit=4 * 2**20))) == 601


def test_a_long_value_that_every_row_names_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    # As a dictionary it stands in the file once; read together the rows would be 100 times that.
    monkeypatch.setattr(tables, "BATCH_BYTES", 64 * 2**10)
    path = tmp_path / "rows.parquet"
    value = "x" * (15 * 2**10)
    table = pyarrow.table({"text": [value] * 100})
    limits = {"dictionary_pagesize_limit": 2**30, "write_batch_size": 1000}
    parquet.write_table(table, path, compression="zstd", **limits)
    with parquet.ParquetFile(path) as file, open(path, "rb") as raw:
        size = tables._dictionaries(raw, file.metadata.row_group(0))
    assert size == len(value) + 4
    sizes = []
    original = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, batch_size, **more: (
            sizes.append(batch_size) or original(self, batch_size=batch_size, **more)
        ),
    )
    for number, _ in zip(range(5), records(path), strict=False):
        assert number < 5
    assert sizes == [4]


def test_ordinary_tables_are_read_many_rows_at_a_time(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(5000)]}), path)
    with parquet.ParquetFile(path) as file, open(path, "rb") as raw:
        assert 0 < tables._dictionaries(raw, file.metadata.row_group(0)) < 2**17
    assert len(list(records(path))) == count(path) == 5000


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pyarrow.array([2**62], pyarrow.duration("s")), "not Parquet that can be read"),
        (
            pyarrow.Array.from_buffers(
                pyarrow.string(), 1, [None, pyarrow.py_buffer(bytes(4) + b"\1\0\0\0"),
                                      pyarrow.py_buffer(b"\xff")]
            ),
            "not Parquet that can be read",
        ),
    ],
)  # fmt: skip
def test_values_that_cannot_be_read_have_their_row(tmp_path, column, reason):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "t": column}), path)
    with pytest.raises(DataError, match=rf"{path}:1: {reason}"):
        list(records(path))


def test_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    arrays = [pyarrow.array([text]) for text in "abc"]
    table = pyarrow.Table.from_arrays(arrays, names=["prompt", "completion", "prompt"])
    parquet.write_table(table, path)
    with pytest.raises(DataError, match='the column "prompt" is there twice'):
        list(records(path))
