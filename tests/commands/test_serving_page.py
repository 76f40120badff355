"""The commands of docs/serving.md do what they are there for, on an adapter of the page's base."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained import save_trained, write_rows

from qlora_kit.base.source import TINY

Run = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
FOUND = dict.fromkeys(re.findall(r"^ {4}qlora-kit (.*)$", PAGE, re.M))
LINES = [shlex.split(line) for line in FOUND]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's first command leaves, untrained."""
    folder = tmp_path_factory.mktemp("serving")
    save_trained(TINY, folder / "run", bits=4, dtype="fp32")
    write_rows(folder / "rows.jsonl")
    return folder


def test_every_command_line_runs(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few rows; training is left out here, and so is the table of all forms."""
    monkeypatch.chdir(folder)
    for command, *words in LINES:
        if command == "export" and "--compare" not in words:
            target = words[words.index("--output_dir") + 1]
            form = words[words.index("--format") + 1] if "--format" in words else "hf"
            rows = [] if form in ("adapter", "gguf-lora") else ["--verify", "rows.jsonl"]
            answer = run(command, *words, *rows)
            assert answer.code == 0, answer.err
            assert json.loads(Path(target, "export.json").read_text())["format"] == form
        elif command == "evaluate":
            answer = run(command, *words[: words.index("--data")], "--data", "rows.jsonl")
            assert answer.code == 0, answer.err
    for place in re.findall(r"(?:[\w-]+/)+[\w.]+\.gguf|[\w-]+/Modelfile", PAGE):
        assert Path(place).is_file(), place
    assert Path("quantized", "adapter", "adapter_config.json").is_file()


def test_the_base_of_the_page_is_trained_by_it() -> None:
    training = next(words for command, *words in LINES if command == "finetune")
    assert training[training.index("--model") + 1] == "tiny"
    assert training[-2:] == ["--output_dir", "run"]
