"""File types other than JSON lines: what was written is read, and what is broken has its line."""

import csv
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.config.data import DataConfig
from qlora_kit.data import json_text, records
from qlora_kit.data.rows import load_rows
from qlora_kit.data.source import HubSplit, find
from qlora_kit.errors import DataError, UnsafeInputError

DATA = os.environ.get("QLORA_KIT_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")
values = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    return list(records.records(path))


# --- JSON arrays --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(values, st.one_of(values, st.integers(), st.none())), min_size=1),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 40),
    st.booleans(),
)
def test_an_array_is_its_elements_wherever_the_chunks_end(folder, rows, indent, chunk, ascii):
    text = "\ufeff\n" + json.dumps(rows, indent=indent, ensure_ascii=ascii) + "\n"
    path = put(folder, "rows.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "CHUNK", chunk)
        found = read(path)
        assert records.count(path) == len(rows)
    assert [value for _, value in found] == rows
    # The line is that on which the element begins.
    if indent == 2:
        begins = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith("  {")]
        if len(begins) == len(rows) == len(text.split("\n  {")) - 1:
            assert [line for line, _ in found] == begins


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("[]", 1, "empty or blank"),
        ('[{"text": "a"},\n{"text": "b"}', 2, "the end of the file"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, '"]" is missing, found {'),
        ('[{"text": "a"},\n{"text": "b', 2, "Unterminated"),
        ('[{"text": "a"},\n{"text": b}]', 2, "not JSON: Expecting value"),
        ('[{"text": "a"},\n\n5]', 3, "a number, not an object"),
        ('[{"text": "a"},\nnull]', 2, "null, not an object"),
        ('[{"text": "a"},]', 1, "not JSON"),
        ('[{"text": "a"}]\n[1]', 2, "after the end of the array"),
        ("[" * 100_000, 1, "nested too deep"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 2, "byte 0xff near byte offset 26"),
        ('[{"text": "a"}]'.encode("utf-16"), 1, "UTF-16"),
    ],
)
def test_a_broken_array_has_its_line(folder, content, line, reason):
    path = put(folder, "rows.json", content)
    with pytest.raises(DataError, match=rf"{path}:{line}: .*{reason}"):
        read(path)


def test_json_lines_under_the_name_of_an_array_are_read(folder):
    path = put(folder, "rows.json", '{"text": "a"}\n{"text": "b"}\n')
    assert read(path) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_a_value_without_end_is_refused(folder, monkeypatch):
    monkeypatch.setattr(json_text, "CHUNK", 100)
    path = put(folder, "rows.json", '[{"text": "' + "a" * 100_000)
    with pytest.raises(DataError, match=rf"{path}:1: a value is longer"):
        list(records.records(path, limit=3000))


# --- CSV ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(values, values), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_csv_is_the_text_that_stands_there(folder, rows, end, mark):
    # 007 stays 007, NA stays NA, and a blank is no missing value.
    rows = [*rows, ("007", "NA"), ("", "1e5")]
    rows = [(a.replace("\0", ""), b.replace("\0", "")) for a, b in rows]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *rows])
    path = put(folder, "rows.csv", b"\xef\xbb\xbf" * mark + buffer.getvalue().encode())
    found = read(path)
    assert [tuple(value.values()) for _, value in found] == rows
    assert all(list(value) == ["prompt", "completion"] for _, value in found)
    physical = buffer.getvalue().split("\n")
    for line, value in found:
        assert physical[line - 1].startswith(
            '"' + value["prompt"].split("\n")[0].replace('"', '""')[:1]
        )


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("", 1, "empty or blank"),
        ("text\n", 1, "empty or blank"),
        ("text,text\na,b\n", 1, 'the column "text" is there twice'),
        ("prompt,completion\na,b\n\na,b,c\n", 4, "3 values below 2 columns"),
        ("prompt,completion\na\n", 2, "1 values below 2 columns"),
        ("prompt;completion\na, b;c\n", 1, "parted by semicolons, .* as parted by commas; save"),
        ("prompt\tcompletion\na\tb\n", 1, "parted by tabs, .* as parted by commas; save"),
        ('text\na\n"b\nc', 3, "not CSV"),
        ('text\n"a"b\n', 2, "not CSV"),
        (b"text\na\n\xff\n", 3, "byte 0xff at byte offset 0 of the line .7 of the file"),
    ],
)
def test_broken_csv_has_its_line(folder, content, line, reason):
    path = put(folder, "rows.csv", content)
    with pytest.raises(DataError, match=rf"{path}:{line}: .*{reason}"):
        read(path)


def test_a_space_around_the_name_of_a_column_is_none_of_it(folder):
    ((_, row),) = read(put(folder, "rows.csv", "prompt, completion\na, b\n"))
    assert row == {"prompt": "a", "completion": " b"}


def test_a_column_whose_name_has_a_sign_of_its_own_is_one_column(folder):
    ((_, row),) = read(put(folder, "rows.csv", '"a text; or more of it"\na\n'))
    assert row == {"a text; or more of it": "a"}


# --- Parquet and the hub ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(values, values), min_size=1, max_size=600), st.integers(1, 300))
def test_parquet_is_its_rows(folder, rows, group):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [a for a, _ in rows], "completion": [b for _, b in rows]})
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    assert [(value["prompt"], value["completion"]) for _, value in read(path)] == rows
    assert [line for line, _ in read(path)] == list(range(1, len(rows) + 1))


def test_chats_in_parquet_are_messages(folder):
    import pyarrow
    import pyarrow.parquet

    # Tables fill what a message does not have with nulls.
    chat = [
        {"role": "user", "content": "u", "weight": None, "tool_calls": None},
        {"role": "assistant", "content": None, "weight": 1, "tool_calls": [{"name": "f"}]},
    ]
    path = folder / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [chat]}), path)
    (row,) = load_rows(DataConfig(data=str(path), eval_fraction=0), 0).train
    assert row.content["messages"] == [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            "weight": 1,
        },
    ]


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -20])
def test_broken_parquet_is_an_error(folder, cut):
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"{path}:1: not Parquet"):
        read(path)


def test_numbers_in_parquet_are_no_text(folder):
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a"]}), path)
    with pytest.raises(DataError, match=rf'{path}:1: "text" is a bytes, not text'):
        load_rows(DataConfig(data=str(path)), 0)


ABSENT = """
import sys
sys.modules["pyarrow"] = sys.modules["pyarrow.parquet"] = sys.modules["datasets"] = None
from qlora_kit.config.data import DataConfig
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import ResourceError
for data in sys.argv[1:]:
    try:
        load_rows(DataConfig(data=data), 0)
    except ResourceError as error:
        print(error)
"""


def test_without_the_extra_parquet_and_the_hub_say_what_to_install(folder):
    path = put(folder, "rows.parquet", b"PAR1")
    arguments = [sys.executable, "-c", ABSENT, str(path), "some-org/some-data"]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    first, second = said.splitlines()
    assert "rows.parquet: reading it needs the package pyarrow" in first
    assert "some-org/some-data: reading it needs the package datasets" in second
    assert said.count("pip install 'qlora-kit[data]'") == 2


@pytest.mark.parametrize(
    ("data", "subset"), [("org/name", None), ("org/name:main", "main"), ("o.r-g/n_a.me", None)]
)
def test_a_hub_id_is_told_from_a_path(tmp_path, monkeypatch, data, subset):
    monkeypatch.chdir(tmp_path)
    name = data.partition(":")[0]
    assert find(data) == (HubSplit(name, subset, "train"), HubSplit(name, subset, "validation"))
    for path in (f"./{data}", f"/{data}", f"~/{data}", f"a/{data}", "rows", "org/rows.jsonl"):
        assert not isinstance(find(path)[0], HubSplit)
    (tmp_path / name.split("/")[0]).mkdir()
    assert find(data) == (Path(data), None)


HUB = """
import sys
from qlora_kit.config.data import DataConfig
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import QloraKitError
try:
    rows = load_rows(DataConfig(data=sys.argv[1]), 0)
    print(rows.format, rows.train_source, rows.eval_source)
    print([(row.where, row.content) for row in rows.train])
    print([row.content for row in rows.evaluation])
    print(rows.train.fingerprint == load_rows(DataConfig(data=sys.argv[1]), 0).train.fingerprint)
except QloraKitError as error:
    print(type(error).__name__, error)
"""


def hub(data, home, endpoint, **more):
    """What a process says that knows the hub at `endpoint` only."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **more}
    arguments = [sys.executable, "-c", HUB, data]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, env=environment, timeout=600
    )
    return done.stdout.strip()


class HubFiles(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol by which a client lists and fetches a data set's files."""

    files = {
        "train.jsonl": b'{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n',
        "test.jsonl": b'{"prompt": "r", "completion": "e"}\n',
    }
    sha = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *arguments):
        pass

    def answer(self, content, kind="application/json", **headers):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(json.dumps(self.entries() if "paths" in asked else []).encode())

    def entries(self):
        return [
            {"type": "file", "path": name, "size": len(content), "oid": name.encode().hex()}
            for name, content in self.files.items()
        ]

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/org/name/tree/") and path.endswith(self.sha):
            self.answer(json.dumps(self.entries()).encode())
        elif path.startswith(("/api/datasets/org/name/revision/", "/api/datasets/org/name")) and (
            "/tree/" not in path
        ):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/name", "sha": self.sha, "siblings": siblings, "private": False}
            self.answer(json.dumps({**info, "tags": [], "downloads": 0}).encode())
        elif path.startswith("/datasets/org/name/resolve/") and (
            content := self.files.get(path.rsplit("/", 1)[1])
        ):
            self.answer(
                content,
                "text/plain",
                ETag=f'"{content.hex():.40}{len(content)}"',
                X_Repo_Commit=self.sha,
            )
        else:
            self.send_response(404)
            known = "/org/name/" in path
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()


def test_a_data_set_comes_from_the_hub_and_then_from_its_local_cache(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubFiles) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            said = hub("org/name", tmp_path, endpoint)
            missing = hub("org/other", tmp_path, endpoint)
        finally:
            server.shutdown()
            thread.join()
    first = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
    rows = [(f"org/name/train:{line}", content) for line, content in enumerate(first, 1)]
    held_out = [{"prompt": "r", "completion": "e"}]
    assert said == f"prompt org/name/train org/name/test\n{rows}\n{held_out}\nTrue"
    assert missing.startswith("DataError org/other:1: the hub's data set cannot be loaded")
    assert hub("org/name", tmp_path, endpoint, HF_HUB_OFFLINE="1") == said
    said = hub("org/third", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert said.startswith("ResourceError org/third: the hub cannot be reached")


# --- plain text ---------------------------------------------------------------------------------


def tokenizers():
    base = Path(DATA or "")
    gpt2 = base / "tokenizers/gpt2"
    files = (str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt"))
    backend = Tokenizer(models.BPE.from_file(*files))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    return {
        "gpt2": PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end),
        "stories260K": AutoTokenizer.from_pretrained(base / "models/stories260K"),
    }


@needs_data
def test_the_blocks_of_a_text_are_the_text_and_their_tokens_its_tokens():
    path = Path(DATA or "") / "text/tinyshakespeare/input.txt"
    text = path.read_text()
    found = read(path)
    blocks = [value["text"] for _, value in found]
    assert "".join(blocks) == text
    assert 10 <= len(blocks) <= 40
    assert [("goes_on" in value) for _, value in found] == [True] * (len(blocks) - 1) + [False]
    starts = [text[: sum(map(len, blocks[:n]))].count("\n") + 1 for n in range(len(blocks))]
    assert [line for line, _ in found] == starts
    tokenizer = tokenizers()["gpt2"]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = tokenizer(blocks, add_special_tokens=False)["input_ids"]
    assert [token for part in parts for token in part] == whole


def test_a_text_is_one_document_with_one_end(folder):
    body = "".join(f"line {n}\n" for n in range(4000))
    path = put(folder, "rows.txt", "\ufeff" + body)
    rows = load_rows(DataConfig(data=str(path)), 0)
    assert rows.format == "text"
    every = sorted([*rows.train, *rows.evaluation], key=lambda row: row.line)
    assert "".join(row.content["text"] for row in every) == body
    assert [row.content.get("goes_on", False) for row in every] == [True] * (len(every) - 1) + [
        False
    ]
    assert 0 < sum(len(row.content["text"]) for row in rows.evaluation) < len(body) / 4


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_text_without_words_is_an_error(folder, content):
    path = put(folder, "rows.txt", content)
    with pytest.raises(DataError, match=rf"{path}:1: the file is empty or blank"):
        read(path)


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".txt"])
def test_what_is_no_plain_file_is_refused_whatever_its_type(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    os.mkfifo(path)
    with pytest.raises(UnsafeInputError, match="pipe, socket or device"):
        load_rows(DataConfig(data=str(path)), 0)


def test_a_line_of_any_type_has_its_limit(folder):
    for name in ("rows.csv", "rows.txt"):
        path = put(folder, name, "text\n" + "a" * 100)
        list(records.records(path, limit=100))
        with pytest.raises(DataError, match=rf"{path}:2: the line is longer"):
            list(records.records(put(folder, name, "text\n" + "a" * 101), limit=100))
