"""What is said of adapters that were trained on prompts and completions."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.lora.adapter_files import AdapterFiles
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.trained_form import plain_note


def saved(directory: Path, config: str) -> SavedAdapter:
    (directory / "config.yaml").write_text(config)
    files = AdapterFiles(directory, {}, directory / "weights", {}, {"name": "tiny"})
    return SavedAdapter(str(directory), files)


@pytest.mark.parametrize(
    ("config", "is_said"),
    [
        ("data: sample:extract\n", True),
        ("data: sample:query\nformat: auto\n", True),
        ("data: gone.jsonl\nformat: prompt\n", True),
        ("data: gone.jsonl\nformat: messages\n", False),
        ("data: gone.jsonl\n", False),
        ("data: sample:not-there\n", False),
    ],
)
def test_adapters_of_prompts_and_completions_are_named(
    tmp_path: Path, config: str, is_said: bool
) -> None:
    note = plain_note({"sql": saved(tmp_path, config)}, "--plain answers")
    said = "sql was trained on prompts and completions: --plain answers as trained"
    assert note == (said if is_said else None)
