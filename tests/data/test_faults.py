"""Bad data files through the command: exit code, one line with file and line, nothing changed."""

import json

import pytest
from families import save_checkpoint, tree_hash
from processor import processor_s

from qlora_kit.commands.finetune import main
from qlora_kit.errors import ERROR_LINE_LIMIT

GOOD = '{"prompt": "p", "completion": "c"}'
FAULTS = {
    # files that hold no rows
    "empty": ("rows.jsonl", "", "rows.jsonl:1: the file is empty or blank"),
    "blank": ("rows.jsonl", "\n \n", "rows.jsonl:1: the file is empty or blank"),
    "missing": (None, "", "rows.jsonl: no such file"),
    "a directory": ("d/other.jsonl", GOOD, "the directory has no train.jsonl"),
    # lines that hold no row
    "truncated": ("rows.jsonl", f"{GOOD}\n{GOOD[:-3]}", "rows.jsonl:2: the line ends in"),
    "two on a line": ("rows.jsonl", f"{GOOD}\n{GOOD} {GOOD}", "rows.jsonl:2: more than one"),
    "an array": ("rows.jsonl", f"{GOOD}\n[{GOOD}]", "rows.jsonl:2: the row is an array"),
    "null": ("rows.jsonl", f"{GOOD}\nnull", "rows.jsonl:2: the row is null"),
    "text": ("rows.jsonl", f'{GOOD}\n"x"', "rows.jsonl:2: the row is text"),
    "a number": ("rows.jsonl", f"{GOOD}\n5", "rows.jsonl:2: the row is a number"),
    # bytes that are no text
    "not UTF-8": (
        "rows.jsonl",
        GOOD.encode() + b"\n\xff",
        "rows.jsonl:2: byte 0xff at byte offset",
    ),
    "UTF-16": ("rows.jsonl", GOOD.encode("utf-16"), "rows.jsonl:1: byte offset 0: UTF-16"),
    # rows of no known shape
    "misspelt": (
        "rows.jsonl",
        f'{GOOD}\n{{"prompt": "p", "completon": "c"}}',
        'rows.jsonl:2: no field "completion"',
    ),
    "a wrong type": (
        "rows.jsonl",
        f'{GOOD}\n{{"prompt": 5, "completion": "c"}}',
        'rows.jsonl:2: "prompt" is a number',
    ),
    "no role": (
        "rows.jsonl",
        '{"messages": [{"content": "x"}]}',
        'rows.jsonl:1: messages[0]: no field "role"',
    ),
    "system twice": (
        "rows.jsonl",
        json.dumps({"messages": [{"role": "system", "content": "x"}] * 2}),
        "rows.jsonl:1: messages[1]: a system message",
    ),
    # rows that are all skipped
    "prompts too long": (
        "rows.jsonl",
        f'{{"prompt": "{"p" * 200}", "completion": "c"}}\n' * 9,
        "prompt longer than max_length",
    ),
    "rows of one token": ("rows.jsonl", '{"prompt": "", "completion": ""}\n' * 9, "a single token"),
    "a chat without a template": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
        * 3,
        "the tokenizer has no chat template",
    ),
    # other types
    "csv": ("rows.csv", "prompt,completion\na,b\na\n", "rows.csv:3: 1 values below 2 columns"),
    "json": ("rows.json", f"[{GOOD},\n{GOOD[:-3]}]", "rows.json:2: not JSON"),
    "parquet": ("rows.parquet", "PAR1", "rows.parquet:1: not Parquet"),
    "txt": ("rows.txt", "\n", "rows.txt:1: the file is empty or blank"),
    "xml": ("rows.xml", "<a/>", "files with the suffix .xml are not read"),
}


def test_more_tokens_than_embedding_rows_are_refused(tmp_path, capsys):
    """Fewer are fine: every other base of these tests has more rows than tokens."""
    from families import VOCABULARY, save_tokenizer

    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    save_checkpoint(base)
    save_tokenizer(base, extra=VOCABULARY)
    data.write_text(f"{GOOD}\n" * 9)
    before = tree_hash(base)
    began = processor_s()
    arguments = ["--bits", "16", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    code = main(["--model", str(base), "--data", str(data), *arguments])
    assert processor_s() - began < 10
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 3
    assert line.startswith("error: ")
    assert f"{VOCABULARY + 260} tokens, {VOCABULARY} embedding rows; " in line
    assert "--resize_embeddings" in line
    assert tree_hash(base) == before
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_checkpoint(directory)
    return directory


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_told_in_one_line_and_changes_nothing(
    fault, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, content, reason = FAULTS[fault]
    data = tmp_path / "in"
    data.mkdir()
    path = data / (name or "rows.jsonl")
    path.parent.mkdir(exist_ok=True)
    if name is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = path.parent if fault == "a directory" else path
    before = tree_hash(data), tree_hash(model)
    began = processor_s()
    options = ["--bits", "16", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    code = main(["--model", str(model), "--data", str(given), *options])
    assert processor_s() - began < 2
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 3
    assert line.startswith("error: ")
    assert reason in line
    assert "; " in line or "? " in line
    assert len(line) <= ERROR_LINE_LIMIT
    assert (tree_hash(data), tree_hash(model)) == before
    assert not (tmp_path / "out").exists()
    left = [p for p in (tmp_path / "cache").rglob("*") if p.name not in ("qlora_kit", "tokens")]
    assert all("facts.json" in {q.name for q in p.iterdir()} for p in left if p.is_dir())
