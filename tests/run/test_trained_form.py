"""What is said of adapters that were trained on prompts and completions."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit import finetune
from qlora_kit.lora.adapter_files import AdapterFiles
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.trained_form import is_plain, plain_note


def saved(directory: Path, config: str, **said: str) -> SavedAdapter:
    (directory / "config.yaml").write_text(config)
    files = AdapterFiles(directory, {}, directory / "weights", {}, {"name": "tiny", **said})
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


def test_a_run_on_a_file_of_one_s_own_says_what_its_rows_were(tmp_path: Path) -> None:
    """`auto` is what was found; a header that says so is believed before the options."""
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "two and two", "completion": " is four"}\n' * 8)
    finetune(model="tiny", data=str(data), output_dir=str(run), max_steps=1, save_steps=1)
    data.unlink()
    for directory in (run, run / "checkpoint-1"):
        adapter = SavedAdapter.open(str(directory))
        assert adapter.files.trained_on["row_format"] == "prompt"
        assert is_plain(adapter)
    assert not is_plain(saved(tmp_path, "data: sample:query\n", row_format="messages"))
