"""Laws of rows that a program hands over: they are read as a file's rows are."""

import json
import math

import datasets
import pandas
import pyarrow
import pytest

from qlora_kit.config.data import DataConfig
from qlora_kit.data.lines import GivenRows
from qlora_kit.data.lines import given_rows as given_rows_of
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{n} ü", "completion": f"c{n}", "note": None} for n in range(20)]


def given_rows(rows, **options):
    given = GivenRows(rows)
    return load_rows(DataConfig(given.name, **options), 1, {given.name: given})


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_given_rows_are_those_of_a_file(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ours, files = given_rows(kind(ROWS)), load_rows(DataConfig(str(path)), 1)
    for part in ("train", "evaluation"):
        found = [(row.content, row.line) for row in getattr(ours, part)]
        assert found == [(row.content, row.line) for row in getattr(files, part)]
    assert ours.format == files.format
    assert next(iter(ours.train)).where.startswith("rows:")


def test_the_same_rows_have_the_same_name_and_others_another():
    assert GivenRows(ROWS).name == GivenRows([dict(row) for row in ROWS]).name
    assert GivenRows(ROWS).name != GivenRows(ROWS[::-1]).name
    assert GivenRows(ROWS).name != GivenRows(ROWS[:-1]).name


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": b"bytes"}, r"rows:2: is no JSON: .*bytes"),
        ({"text": math.nan}, r"rows:2: .*NaN"),
        (["text"], r"rows:2: the row is an array, not an object"),
        ({"text": "\ud800"}, r"rows:2: "),
        ({"text": "x" * 2**21}, r"rows:2: the row is longer than 1 MiB"),
    ],
)
def test_a_given_row_is_refused_with_its_number(row, words):
    with pytest.raises(DataError, match=words):
        list(given_rows([{"text": "a"}, row], eval_fraction=0, max_row_size="1MiB").train)


@pytest.mark.parametrize("kind", [pyarrow.Table.from_pylist, pandas.DataFrame])
def test_a_table_is_refused_with_the_call_that_gives_its_rows(kind):
    table = kind(ROWS)
    with pytest.raises(ConfigError, match=rf"a {type(table).__name__}, which .*to_dict\('records'"):
        given_rows_of("data", table)


def test_rows_that_were_given_once_are_not_looked_for_on_the_disk():
    with pytest.raises(DataError, match=r"rows:0123456789ab: .* they lie in no file; .*data=rows"):
        load_rows(DataConfig("rows:0123456789ab"), 1)


def test_rows_are_not_held_out_and_trained_on():
    given = GivenRows(ROWS)
    with pytest.raises(ConfigError, match="is the file that is trained on"):
        load_rows(DataConfig(given.name, eval_data=given.name), 1, {given.name: given})
