import gc
import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processor import processor_s

from qlora_kit.config.data import DataConfig
from qlora_kit.data import source
from qlora_kit.data.rows import load_rows, read_rows
from qlora_kit.data.schema import recognise
from qlora_kit.errors import ConfigError, DataError, UnsafeInputError, error_line

DATA = os.environ.get("QLORA_KIT_DATA")
TEXT = '{"text": "a"}'
PAIR = '{"prompt": "p", "completion": "c"}'


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def make_lines(count, field="text", start=0):
    return "".join(json.dumps({field: f"row {start + n}"}) + "\n" for n in range(count))


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


# --- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "shape", "normal"),
    [
        ({"text": "a", "id": 3}, "text", {"text": "a"}),
        (
            {"prompt": "p", "completion": "c", "text": "pc"},
            "prompt",
            {"prompt": "p", "completion": "c"},
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "text": "all"},
            "instruction",
            {
                "prompt": "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n",
                "completion": "3",
            },
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Ho"},
            "instruction",
            {"prompt": "### Instruction:\nHi\n\n### Response:\n", "completion": "Ho"},
        ),
        (
            {"instruction": "Hi", "output": "Ho"},
            "instruction",
            {"prompt": "### Instruction:\nHi\n\n### Response:\n", "completion": "Ho"},
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u", "name": "x", "weight": 0, "id": 7},
                    {"role": "assistant", "content": ""},
                ],
                "tools": None,
            },
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u", "name": "x", "weight": 0},
                    {"role": "assistant", "content": ""},
                ]
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
                    {"role": "tool", "content": "4", "tool_call_id": "1", "tool_calls": None},
                    {"role": "assistant", "content": "a", "weight": 1.0, "reasoning_content": "r"},
                ],
                "tools": '[{"name": "f"}]',
            },
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"type": "function", "function": {"name": "f", "arguments": {}}}
                        ],
                    },
                    {"role": "tool", "content": "4", "tool_call_id": "1"},
                    {"role": "assistant", "content": "a", "reasoning_content": "r", "weight": 1},
                ],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "u"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                        ],
                    },
                    {"role": "tool", "content": "4"},
                    {"role": "assistant", "content": "a"},
                ]
            },
        ),
    ],
)
def test_each_shape_is_recognised_and_made_normal(write, content, shape, normal):
    assert recognise(content, "x:1") == shape
    path = write(json.dumps(content))
    for format in ("auto", shape):
        (row,) = read_rows(path, format)
        assert row.content == normal
        assert (row.source, row.line, row.where) == (str(path), 1, f"{path}:1")


def test_the_first_row_decides_the_shape(write):
    path = write(TEXT + "\n" + PAIR + "\n")
    with pytest.raises(DataError, match=rf'{path}:2: no field "text"'):
        list(read_rows(path))


def test_a_named_shape_beats_the_recognised_one(write):
    path = write('{"prompt": "p", "completion": "c", "text": "t"}')
    assert [row.content for row in read_rows(path, "text")] == [{"text": "t"}]


values = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(values, values), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_what_was_written_is_read(tmp_path_factory, pairs, end, mark, last_end, ascii):
    # Byte order mark, CRLF, blank lines, no final newline; and every character.
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    text = end.join(json.dumps(row, ensure_ascii=ascii) for row in rows) + end * last_end
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    found = list(read_rows(path))
    assert [row.content for row in found] == rows
    physical = path.read_bytes().split(b"\n")
    for row in found:
        raw = physical[row.line - 1].removeprefix(b"\xef\xbb\xbf")
        assert json.loads(raw) == row.content


# --- faults: each with its line ---------------------------------------------------------------


BAD_LINES = {
    # lines that hold no row
    '{"text": "a': "ends in the middle",
    '{"text": "a"': "ends in the middle",
    '{"text":': "ends in the middle",
    f"{TEXT} {TEXT}": "more than one JSON value",
    f"[{TEXT}]": "an array, not an object",
    "null": "null, not an object",
    '"x"': "text, not an object",
    "5": "a number, not an object",
    "true": "true, not an object",
    "{'text': 'a'}": "not JSON: .* column 2",
    "hello": "not JSON",
    '{"text": "a",}': "not JSON",
    # rows of no known shape
    '{"txt": "a"}': 'no field "text".*did you mean "text" by "txt"',
    "{}": 'no field "text"',
    '{"text": null}': 'no field "text"',
    '{"text": 5}': '"text" is a number, not text',
    '{"text": ["a"]}': '"text" is an array, not text',
    '{"text": {"a": 1}}': '"text" is an object, not text',
    # whatever else a file can hold
    '{"text": "\\ud800"}': "surrogate",
    "[" * 100_000: "nested too deep",
    '{"text": "a", "n": ' + "9" * 5000 + "}": "number too long",
    '{"text": "a\0"}': "NUL at byte offset 40",
}


@pytest.fixture
def nothing_collected():
    """No garbage of other tests is finalized where a line nests so deep that Python has no stack.

    What a finalizer raises there would be this test's failure.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_collected")
@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named(write, bad):
    path = write(f"{TEXT}\n\n{TEXT}\n{bad}\n{TEXT}\n")
    with pytest.raises(DataError, match=rf"{path}:4: .*{BAD_LINES[bad]}") as caught:
        list(read_rows(path))
    assert str(path) in error_line(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"promt": "p", "completion": "c"}', 'no field "prompt".*by "promt"'),
        ('{"prompt": "p", "completon": "c"}', 'no field "completion".*by "completon"'),
        ('{"prompt": "p"}', 'no field "completion"'),
        ('{"instruction": "i", "response": "r"}', 'no field "output"'),
        ('{"mesages": []}', 'no field "messages".*by "mesages"'),
        ('{"question": "q", "answer": "a"}', '"question", "answer", which is no known shape'),
        ("{}", "none, which is no known shape"),
        ('{"messages": []}', '"messages" is empty'),
        ('{"messages": null}', "which is no known shape"),
        ('{"messages": "hi"}', '"messages" is text'),
        ('{"messages": ["hi"]}', r"messages\[0\] is text"),
        ('{"messages": [{"content": "x"}]}', r'messages\[0\]: no field "role"'),
        ('{"messages": [{"rol": "user", "content": "x"}]}', 'did you mean "role" by "rol"'),
        ('{"messages": [{"role": "user"}]}', r'messages\[0\]: no field "content"'),
        ('{"messages": [{"role": 3, "content": "x"}]}', '"role" is a number'),
        ('{"messages": [{"role": "user", "content": null}]}', 'no field "content"'),
        ('{"messages": [{"role": "user", "content": 3}]}', '"content" is a number'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            r'content\[0\]: no field "text"',
        ),
        (chat(("usr", "x")), 'unknown role "usr", did you mean "user"'),
        (chat(("tool", "x")), r"messages\[0\]: a tool's answer before any assistant"),
        (chat(("system", "s"), ("system", "s"), ("user", "u")), r"messages\[1\]: a system"),
        (chat(("user", "u"), ("system", "s")), r"messages\[1\]: a system"),
        (chat(("assistant", "a"), ("user", "u")), r"messages\[0\]: an assistant turn before"),
        (chat(("system", "s"), ("assistant", "a")), r"messages\[1\]: an assistant turn before"),
        (
            '{"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}',
            '"tool_calls" of a user turn',
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", '
            '"content": "x", "tool_calls": [1]}]}',
            r"tool_calls\[0\] is a number, not an object",
        ),
        (
            '{"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]}',
            '"function_call" of a user turn',
        ),
        ('{"messages": [{"role": "user", "content": "x", "weight": 2}]}', '"weight" is 2'),
        ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', '"weight" is 0.5'),
        ('{"messages": [{"role": "user", "content": "x", "weight": 1}]}', "of a user turn"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "what is no object"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}}', "is an object"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "[1"}', "is not JSON"),
        ('{"instruction": "i", "instances": []}', '"instances" is empty'),
        ('{"instruction": "i", "instances": [5]}', r"instances\[0\] is a number"),
        ('{"instruction": "i", "instances": [{"input": "x"}]}', r'\[0\]: no field "output"'),
        ('{"conversations": [{"from": "gpt", "value": "x"}]}', "an assistant turn before"),
        ('{"conversations": [{"from": "bot", "value": "x"}]}', 'unknown role "bot"'),
        ('{"conversations": [{"from": "human"}]}', r'conversations\[0\]: no field "value"'),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(write, content, reason):
    path = write("\n" + content)
    with pytest.raises(DataError, match=rf"{path}:2: .*{reason}"):
        list(read_rows(path))


def test_a_byte_that_is_not_utf8_is_told_with_its_offset(write):
    # The offset in the line and in the file, byte order mark included.
    first = b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n"
    for prefix in (b"", b"\xef\xbb\xbf", first):
        bad = b'{"text": "\xc3\xa9 \xff"}'
        path = write(prefix + bad)
        offset = bad.index(b"\xff")
        line = 1 + prefix.count(b"\n")
        reason = rf"{path}:{line}: byte 0xff at byte offset {offset} of the line "
        with pytest.raises(DataError, match=reason + rf"\({len(prefix) + offset} of the file\)"):
            list(read_rows(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(write, encoding):
    path = write((TEXT + "\n").encode(encoding))
    with pytest.raises(DataError, match=rf"{path}:1: .*byte offset \d: UTF-16"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\r\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"]
)
@pytest.mark.parametrize("format", ["auto", "text"])
def test_a_file_without_rows_is_an_error(write, content, format):
    path = write(content)
    with pytest.raises(DataError, match=rf"{path}:1: .*empty or blank"):
        list(read_rows(path, format))
    with pytest.raises(DataError, match="empty or blank"):
        load_rows(DataConfig(data=str(path), format=format), 0)


@pytest.mark.parametrize("suffix", [".xml", ".jsonl.xz", ".gz", ""])
def test_other_files_are_refused_by_name(write, suffix):
    path = write(TEXT, "rows" + suffix)
    for call in (lambda: list(read_rows(path)), lambda: load_rows(DataConfig(data=str(path)), 0)):
        with pytest.raises(DataError, match=r"are not read; give a \.jsonl"):
            call()


@pytest.mark.parametrize(
    "data", ["missing.jsonl", "no/such/file.jsonl", "rows.jsonl/under", "~nobody/x.jsonl"]
)
def test_a_missing_file_is_an_error(write, data):
    base = write(TEXT).parent
    name = data if data.startswith("~") else f"{base}/{data}"
    with pytest.raises(DataError, match="no such file"):
        load_rows(DataConfig(data=name), 0)


def test_a_name_with_a_nul_is_no_path():
    with pytest.raises(ConfigError, match="data must be a name or a path"):
        DataConfig(data="a\0b.jsonl")


@pytest.mark.timeout(300)  # a pipe that is opened waits for its other end
@pytest.mark.parametrize("kind", ["fifo", "device", "endless", "socket"])
@pytest.mark.parametrize("role", ["data", "eval_data", "member"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, write, kind, role):
    path = tmp_path / "d" / ("train.jsonl" if role == "member" else "pipe.jsonl")
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    good = str(write(TEXT))
    config = {
        "data": DataConfig(data=str(path)),
        "eval_data": DataConfig(data=good, eval_data=str(path)),
        "member": DataConfig(data=str(path.parent)),
    }[role]
    began = processor_s()
    with pytest.raises(UnsafeInputError, match="pipe, socket or device"):
        load_rows(config, 0)
    with pytest.raises(UnsafeInputError):
        next(read_rows(path))
    assert processor_s() - began < 2


def test_a_line_without_end_is_refused_and_a_larger_limit_takes_it(write):
    size = 2**20
    fits = '{"text": "' + "a" * (size - 12) + '"}'
    assert len(fits) == size
    path = write(f"{TEXT}\n" + fits)
    config = DataConfig(data=str(path), eval_fraction=0, max_row_size="1MiB")
    assert len(list(load_rows(config, 0).train)) == 2
    path = write(f"{TEXT}\n" + fits[:-2] + 'a"}')
    with pytest.raises(DataError, match=rf"{path}:2: the line is longer than 1 MiB.*--max_row_siz"):
        list(load_rows(config, 0).train)
    config = DataConfig(data=str(path), eval_fraction=0, max_row_size="2MiB")
    assert len(list(load_rows(config, 0).train)) == 2


# --- what is held out -------------------------------------------------------------------------


def texts(rows, field="text"):
    return [row.content[field] for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 60),
    st.one_of(st.none(), st.floats(0.001, 0.999)),
    st.integers(0, 2**63 - 1),
)
def test_a_share_is_held_out_and_not_trained_on(tmp_path_factory, count, fraction, seed):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(make_lines(count))
    rows = load_rows(DataConfig(data=str(path), eval_fraction=fraction), seed)
    train, evaluation = list(rows.train), list(rows.evaluation)
    if fraction is None and count < 20:  # less than a row
        assert (len(train), evaluation) == (count, [])
        assert f"none: 5 % of the {count} rows of rows.jsonl is less than one" in rows.eval_source
        return
    assert sorted(train + evaluation, key=lambda row: row.line) == list(read_rows(path))
    wanted = (0.05 if fraction is None else fraction) * count
    assert abs(len(evaluation) - wanted) <= 1
    assert train
    assert evaluation
    assert rows.train
    assert rows.evaluation
    again = load_rows(DataConfig(data=str(path), eval_fraction=fraction), seed)
    assert (list(again.train), list(again.evaluation)) == (train, evaluation)
    assert rows.train_source == "rows.jsonl"
    assert f"% of rows.jsonl, drawn by seed {seed}" in rows.eval_source
    for part in (train, evaluation):
        assert [row.line for row in part] == sorted(row.line for row in part)


def test_the_share_depends_on_the_seed(write):
    config = DataConfig(data=str(write(make_lines(100))), eval_fraction=0.1)
    drawn = [tuple(texts(load_rows(config, seed).evaluation)) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert load_rows(config, 42).eval_source == "10 % of rows.jsonl, drawn by seed 42"


def test_zero_turns_evaluation_off_and_one_row_is_trained_on(write):
    rows = load_rows(DataConfig(data=str(write(make_lines(50))), eval_fraction=0), 0)
    assert (len(list(rows.train)), rows.evaluation, rows.eval_source) == (50, (), "none")
    rows = load_rows(DataConfig(data=str(write(TEXT))), 0)
    assert (texts(rows.train), rows.evaluation) == (["a"], ())
    assert "single row" in rows.eval_source


def test_held_out_files_go_eval_data_then_valid_then_test(write, tmp_path):
    write(make_lines(3), "d/train.jsonl")
    other = write(make_lines(1, start=70), "other.jsonl")
    directory = str(tmp_path / "d")

    rows = load_rows(DataConfig(data=directory, eval_fraction=0.05), 0)
    assert (len(list(rows.train)), len(list(rows.evaluation))) == (2, 1)
    write(make_lines(2, start=50), "d/test.jsonl")
    rows = load_rows(DataConfig(data=directory), 0)
    assert (texts(rows.train), texts(rows.evaluation)) == (
        ["row 0", "row 1", "row 2"],
        ["row 50", "row 51"],
    )
    assert rows.eval_source == "test.jsonl"
    write(make_lines(1, start=60), "d/valid.jsonl")
    rows = load_rows(DataConfig(data=directory), 0)
    assert (texts(rows.evaluation), rows.eval_source) == (["row 60"], "valid.jsonl")
    rows = load_rows(DataConfig(data=directory, eval_data=str(other)), 0)
    assert (texts(rows.evaluation), rows.eval_source) == (["row 70"], "other.jsonl")
    assert texts(rows.train) == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_a_share_beside_a_held_out_file_is_an_error_and_zero_turns_it_off(write, tmp_path, name):
    write(make_lines(3), "d/train.jsonl")
    held_out = write(make_lines(3), f"d/{name}.jsonl")
    with pytest.raises(ConfigError, match=f"eval_fraction 0.5 is given beside {held_out}"):
        load_rows(DataConfig(data=str(tmp_path / "d"), eval_fraction=0.5), 0)
    rows = load_rows(DataConfig(data=str(tmp_path / "d"), eval_fraction=0), 0)
    assert (len(texts(rows.train)), rows.evaluation, rows.eval_source) == (3, (), "none")
    for fraction in (0.0, 0.5):
        with pytest.raises(ConfigError, match="eval_fraction"):
            DataConfig(data=str(tmp_path), eval_data=str(held_out), eval_fraction=fraction)


def test_what_is_trained_on_is_not_held_out(write, tmp_path):
    path = write(make_lines(3))
    link = tmp_path / "same.jsonl"
    link.symlink_to(path)
    for same in (path, link):
        with pytest.raises(ConfigError, match="is the file that is trained on"):
            load_rows(DataConfig(data=str(path), eval_data=str(same)), 0)


def test_held_out_rows_have_the_shape_of_the_others(write):
    train, held_out = write(TEXT), write(PAIR, "held_out.jsonl")
    with pytest.raises(DataError, match=rf'{held_out}:1: no field "text"'):
        load_rows(DataConfig(data=str(train), eval_data=str(held_out)), 0)


def test_a_directory_needs_one_train_file_that_is_read(write, tmp_path):
    (tmp_path / "d").mkdir()
    config = DataConfig(data=str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        load_rows(config, 0)
    csv = write("text\na\nb\n", "d/train.csv")
    assert texts(load_rows(DataConfig(data=str(tmp_path / "d"), eval_fraction=0), 0).train) == [
        "a",
        "b",
    ]
    train = write(TEXT, "d/train.jsonl")
    with pytest.raises(DataError, match=r"train.csv and train.jsonl both are its train file"):
        load_rows(config, 0)
    csv.unlink()
    write("a", "d/valid.xml")
    # Held-out rows that are there and cannot be read are not passed over for a share.
    with pytest.raises(DataError, match=r"valid.xml: files with the suffix .xml are not read"):
        load_rows(config, 0)
    (tmp_path / "d" / "valid.xml").unlink()
    (tmp_path / "d" / "valid.jsonl").mkdir()
    with pytest.raises(DataError, match=r"valid\.jsonl: is a directory"):
        load_rows(config, 0)
    with pytest.raises(DataError, match="is a directory"):
        list(read_rows(tmp_path / "d"))
    assert train.exists()


# --- columns ------------------------------------------------------------------------------------


def test_columns_give_other_names_and_hide_what_has_the_name(write):
    record = {"question": "q", "answer": "a", "prompt": "other", "n": 1}
    path = write(json.dumps(record))
    columns = "question=prompt, answer=completion"
    for format in ("auto", "prompt"):
        config = DataConfig(data=str(path), columns=columns, format=format)
        rows = load_rows(config, 0)
        assert [row.content for row in rows.train] == [{"prompt": "q", "completion": "a"}]
        assert rows.format == "prompt"
    (row,) = read_rows(path, columns="answer=text,question=input")
    assert row.content == {"text": "a"}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("question", "is not NAME=FIELD"),
        ("question=", "is not NAME=FIELD"),
        ("=prompt", "is not NAME=FIELD"),
        ("question=promt", "is not NAME=FIELD.*one of"),
        ("a=prompt,b=prompt", "stands beside"),
        ("a=prompt,a=completion", "stands beside"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(write, columns, reason):
    with pytest.raises(ConfigError, match=reason):
        load_rows(DataConfig(data=str(write(PAIR)), columns=columns), 0)


def test_a_missing_column_is_named_with_its_line(write):
    good = '{"question": "q", "answer": "a"}'
    path = write(good + "\n" + '{"question": "q", "anwser": "a"}\n')
    config = DataConfig(
        data=str(path), columns="question=prompt,answer=completion", eval_fraction=0
    )
    with pytest.raises(DataError, match=rf'{path}:2: no column "answer".*did you mean "anwser"'):
        list(load_rows(config, 0).train)


def test_samples_are_found_by_name(write, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "SAMPLES", tmp_path)
    with pytest.raises(DataError, match="sample: no such sample; the package has: none"):
        load_rows(DataConfig(data="sample"), 0)
    write(make_lines(3), "beta/train.jsonl")
    write(make_lines(2, start=10), "alpha/train.jsonl")
    write(make_lines(1, start=20), "alpha/valid.jsonl")
    for data in ("sample", "sample:alpha"):
        rows = load_rows(DataConfig(data=data), 0)
        assert texts(rows.train) == ["row 10", "row 11"]
        assert texts(rows.evaluation) == ["row 20"]
        assert rows.train_source == "sample:alpha/train.jsonl"
        assert rows.eval_source == "sample:alpha/valid.jsonl"
    assert len(texts(load_rows(DataConfig(data="sample:beta", eval_fraction=0), 0).train)) == 3
    for name in ("gamma", "../beta", str(tmp_path / "beta"), "."):
        with pytest.raises(DataError, match="the package has: alpha, beta"):
            load_rows(DataConfig(data=f"sample:{name}"), 0)


@pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")
def test_real_files_are_read_whole():
    base = Path(DATA or "") / "text"
    rows = load_rows(DataConfig(data=str(base / "wikisql")), 0)
    assert (len(list(rows.train)), len(list(rows.evaluation)), rows.format) == (1000, 100, "prompt")
    assert rows.eval_source == "valid.jsonl"
    raw = [json.loads(line) for line in (base / "wikisql" / "train.jsonl").open()]
    assert [row.content for row in rows.train] == raw
    with pytest.raises(
        DataError, match=r'gsm8k/train.jsonl:1: the fields are "question", "answer".*--columns'
    ):
        load_rows(DataConfig(data=str(base / "gsm8k")), 0)
    columns = "question=prompt,answer=completion"
    rows = load_rows(DataConfig(data=str(base / "gsm8k"), columns=columns), 0)
    assert (len(texts(rows.train, "prompt")), len(texts(rows.evaluation, "prompt"))) == (7473, 1319)
    raw = [json.loads(line) for line in (base / "gsm8k" / "test.jsonl").open()]
    assert texts(rows.evaluation, "completion") == [row["answer"] for row in raw]
    tasks = base / "seed_tasks" / "seed_tasks.jsonl"
    rows = load_rows(DataConfig(data=str(tasks), eval_fraction=0), 0)
    raw = [json.loads(line) for line in tasks.open()]
    answers = [case["output"] for row in raw for case in row["instances"]]
    assert (rows.format, texts(rows.train, "completion")) == ("instruction", answers)


@pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")
def test_real_conversations_are_messages():
    path = Path(DATA or "") / "text/chat/dummy_conversation.json"
    chats = json.loads(path.read_text())
    rows = list(read_rows(path))
    assert len(rows) == len(chats) == 500
    for row, chat in zip(rows, chats, strict=True):
        assert [turn["content"] for turn in row.content["messages"]] == [
            turn["value"] for turn in chat["conversations"]
        ]
