"""Every spelling of a field against what was written down by hand, from every type of file."""

import csv
import gzip
import json
import re

import pytest
from chat_tokenizer import chat_tokenizer
from spelled_rows import ALIKE, ROWS, TEMPLATE

from qlora_kit.config.data import DataConfig
from qlora_kit.data.encode import encode, encode_rows
from qlora_kit.data.rows import load_rows, read_rows
from qlora_kit.errors import DataError

BY_NAME = {name: row for name, row, _, _ in ROWS}


@pytest.fixture(scope="module")
def tokenizer():
    made = chat_tokenizer()
    made.chat_template = TEMPLATE
    return made


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_hand(tokenizer, text):
    """Ids and labels of a labelled text, by the characters of each token."""
    pieces = re.split(r"(\[\[|\]\])", text)
    plain, trained, learn = "", [], False
    for piece in pieces:
        if piece in ("[[", "]]"):
            learn = piece == "[["
            continue
        plain += piece
        trained += [learn] * len(piece)
    found = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    labels = [
        token if trained[first] else -100
        for token, (first, _) in zip(ids, found["offset_mapping"], strict=True)
    ]
    return ids, labels


def test_names_are_unique_and_rows_are_many():
    assert len(BY_NAME) == len(ROWS) >= 60


@pytest.mark.parametrize(("name", "row", "text", "unused"), ROWS, ids=list(BY_NAME))
def test_a_row_is_read_as_it_was_meant(tokenizer, tmp_path, name, row, text, unused):
    (found,) = read_rows(written(tmp_path / "rows.jsonl", [row]))
    (encoded,) = encode(found, tokenizer, 1000)
    ids, labels = by_hand(tokenizer, text)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids)
    assert (encoded.input_ids, encoded.labels) == (ids, labels)
    assert found.unused == unused


@pytest.mark.parametrize(("field", "names"), ALIKE, ids=[field for field, _ in ALIKE])
def test_every_type_of_file_gives_the_same_tokens(tokenizer, tmp_path, field, names):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [BY_NAME[name] for name in names]
    table = pyarrow.Table.from_pylist(rows, schema=_schema(pyarrow, rows))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fields = list(dict.fromkeys(name for row in rows for name in row))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"rows.{suffix}", "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(fields)
            writer.writerows([[_cell(row.get(name)) for name in fields] for row in rows])
    expected = [
        encode(row, tokenizer, 1000) for row in read_rows(written(tmp_path / "rows.jsonl", rows))
    ]
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    names = ("rows.parquet", "rows.json", "saved", "rows.jsonl.gz", "rows.csv", "rows.tsv")
    # Of a prompt in CSV nobody can say whether it is a list of messages or text that looks so.
    for name in names[: -2 if field == "trl" else None]:
        config = DataConfig(data=str(tmp_path / name), eval_fraction=0)
        found = [encode(row, tokenizer, 1000) for row in load_rows(config, 0).train]
        assert found == expected, name


def _schema(pyarrow, rows):
    """The union of the rows' own schemas, as `datasets` and pandas make it."""
    schemas = [pyarrow.Table.from_pylist([row]).schema for row in rows]
    return pyarrow.unify_schemas(
        [_nulls_out(pyarrow, schema) for schema in schemas], promote_options="permissive"
    )


def _nulls_out(pyarrow, schema):
    return pyarrow.schema([field for field in schema if field.type != pyarrow.null()])


def _cell(value):
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


@pytest.mark.parametrize("name", ["arguments", "arguments as text", "two calls", "sharegpt call"])
@pytest.mark.parametrize("written_as", ["c.function.arguments", "'' + c.function.arguments + ''"])
def test_a_template_that_takes_arguments_for_text_gets_their_json(tmp_path, name, written_as):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("c.function.arguments | tojson", written_as)
    assert "tojson }}{% endfor %}" not in tokenizer.chat_template
    (found,) = read_rows(written(tmp_path / "rows.jsonl", [BY_NAME[name]]))
    (encoded,) = encode(found, tokenizer, 1000)
    text = next(text for one, _, text, _ in ROWS if one == name)
    assert (encoded.input_ids, encoded.labels) == by_hand(tokenizer, text)


# --- named, never dropped in silence --------------------------------------------------------------


def test_fields_that_nothing_reads_are_counted_by_name(tokenizer, tmp_path):
    rows = [BY_NAME[name] for name in ("messages", "a turn's own", "a chat that says it twice")]
    config = DataConfig(data=str(written(tmp_path / "r.jsonl", rows * 2)), eval_fraction=0)
    found = encode_rows(load_rows(config, 0).train, tokenizer, 1000, cache=tmp_path / "c")
    assert dict(found.unused) == {"messages[].id": 2, "text": 2, "id": 2}


def test_a_column_that_a_mapped_one_hides_is_named(tmp_path):
    path = written(tmp_path / "r.jsonl", [{"q": "a", "a": "b", "prompt": "old"}])
    (row,) = read_rows(path, columns="q=prompt,a=completion")
    assert (row.content, row.unused) == ({"prompt": "a", "completion": "b"}, ("prompt",))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"weight": 0.5}, '"weight" is 0.5'),
        ({"loss_mask": [0, 1]}, '"loss_mask" is'),
        ({"train": "no"}, '"train" is'),
        ({"train": True, "weight": 0}, "contradict each other"),
        ({"reasoning": "a", "thinking": "b"}, '"reasoning" and "thinking" differ'),
        ({"tool_calls": "[{'name': 'f'}]"}, '"tool_calls" is text that is not JSON'),
        ({"tool_calls": [{"name": "f", "arguments": "Oslo"}]}, '"arguments" is text that is not'),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, '"arguments" is an array'),
        ({"tool_calls": [{"arguments": {}}]}, 'no field "name"'),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, 'of type "image_url"'),
        ({"content": [{"type": "text", "text": 5}]}, '"text" is a number'),
    ],
)
def test_a_turn_that_cannot_be_meant_is_refused_by_name(tmp_path, row, reason):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **row}]
    path = written(tmp_path / "r.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=rf"{path}:1: messages\[1\].*{re.escape(reason)}"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "a system text stands"),
        ({"messages": BY_NAME["messages"]["messages"], "tools": "[" * 1000}, "too deep"),
        ({"messages": BY_NAME["messages"]["messages"], "tools": '[{"a": NaN}]'}, "NaN is no"),
        ({"messages": BY_NAME["messages"]["messages"], "tools": '[{"a": 1, "a": 2}]'}, "twice"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "write both as"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "not two texts"),
        ({"instruction": "a", "output": "b", "history": [["a", None]]}, "is null, not text"),
        ({"conversations": [{"from": "human", "value": "a"},
                            {"from": "function_call", "value": "f(x)"}]}, "call that is not JSON"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_meant_is_refused_by_name(tmp_path, row, reason):
    path = written(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError, match=rf"{path}:1: .*{re.escape(reason)}"):
        list(read_rows(path))


def test_alpaca_rows_go_through_the_chat_template_where_asked(tokenizer, tmp_path):
    rows = [BY_NAME[name] for name in ("alpaca system", "alpaca history")]
    path = written(tmp_path / "r.jsonl", rows)
    config = DataConfig(data=str(path), eval_fraction=0, instruction_as_chat=True)
    u, a, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    texts = [
        f"<s><|im_start|>system\nBe exact.{end}{u}Add\n1 2{end}{a}[[3<|im_end|>]]\n",
        f"<s>{u}Hi{end}{a}[[Hello<|im_end|>]]\n{u}Add\n1 2{end}{a}[[3<|im_end|>]]\n",
    ]
    for row, text in zip(load_rows(config, 0).train, texts, strict=True):
        (encoded,) = encode(row, tokenizer, 1000)
        assert (encoded.input_ids, encoded.labels) == by_hand(tokenizer, text)
