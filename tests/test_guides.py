"""The guides in docs/ are true: their examples run, and the options that they name are there."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from option_groups import OPTION_GROUPS

from qlora_kit.commands.main import COMMANDS, main
from qlora_kit.options.option import flag_of

ROOT = Path(__file__).resolve().parent.parent
COMING = (ROOT / "docs" / "coming-from.md").read_text()


def test_each_option_of_the_table_is_an_option_here() -> None:
    known = {
        name
        for group in OPTION_GROUPS
        for field in dataclasses.fields(cast(Any, group))
        for name in (flag_of(field), *field.metadata["option"]["aliases"])
    }
    table = [line for line in COMING.splitlines() if line.startswith("| ")]
    assert len(table) > 20
    ours = [line.strip("|").split("|")[-1] for line in table[1:]]
    named = [name for cell in ours for name in re.findall(r"--(\w[\w-]*)", cell)]
    assert len(named) > 20
    assert [name for name in named if name.replace("-", "_") not in known] == []
    commands = re.findall(r"qlora-kit ([\w-]+)", COMING)
    assert {name.replace("-", "_") for name in commands} <= COMMANDS.keys()


def test_the_commands_of_the_first_hour_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "first-hour.md").read_text()
    rows = re.search(r"```jsonl\n(.*?)```", page, re.S)
    assert rows
    (tmp_path / "rows.jsonl").write_text(rows[1])
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ {4}qlora-kit (.*)$", page, re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        assert main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_example_hands_a_base_to_trl_and_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.search(r"```python\n(.*?)```", COMING, re.S)
    assert example
    monkeypatch.chdir(tmp_path)
    exec(example[1], {"__name__": "__main__"})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
