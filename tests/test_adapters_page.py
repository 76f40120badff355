"""docs/adapters.md is true: its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import randomize_adapter

from qlora_kit import LoRAConfig, inject_lora, load_base, save_adapter

PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()


def test_the_example_answers_with_each_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base("tiny", bits=4)
    for number, name in enumerate(("sql", "qa")):
        inject_lora(base.model, LoRAConfig(r=2 + number), adapter=name)
        randomize_adapter(base.model, seed=number)
        save_adapter(base, tmp_path / "runs" / name, name)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found: dict[str, object] = {}
    exec(compile(code, "adapters.md", "exec"), found)
    assert not (found["sql"] == found["alone"]).all()  # type: ignore[attr-defined]
    assert found["bank"].names == ("qa", "both")  # type: ignore[attr-defined]
    said = re.findall(r"^(sql|qa|None) ", capsys.readouterr().out, re.M)
    assert said == ["sql", "qa", "None"]
