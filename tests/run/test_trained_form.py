"""What is said of adapters that are asked otherwise than they were trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qlora_kit import finetune
from qlora_kit.commands.argv import parse
from qlora_kit.commands.generate import GROUPS
from qlora_kit.config.data import DataConfig
from qlora_kit.data.rows import load_rows
from qlora_kit.lora.adapter_files import AdapterFiles
from qlora_kit.run.generate import generate
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.trained_form import form_note, form_of, is_plain
from qlora_kit.run.verification import asked_rows


def saved(directory: Path, config: str, **said: str) -> SavedAdapter:
    (directory / "config.yaml").write_text(config)
    files = AdapterFiles(directory, {}, directory / "weights", {}, {"name": "tiny", **said})
    return SavedAdapter(str(directory), files)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ("data: sample:extract\n", "prompt"),
        ("data: sample:query\nformat: auto\n", "prompt"),
        ("data: gone.jsonl\nformat: prompt\n", "prompt"),
        ("data: gone.jsonl\nformat: text\n", "text"),
        ("data: gone.jsonl\nformat: messages\n", "messages"),
        ("data: gone.jsonl\nformat: instruction\ninstruction_as_chat: true\n", "messages"),
        ("data: gone.jsonl\nformat: instruction\n", "instruction"),
        ("data: gone.jsonl\nformat: preference\n", None),
        ("data: gone.jsonl\n", None),
        ("data: sample:not-there\n", None),
    ],
)
def test_what_is_not_asked_as_trained_is_said(
    tmp_path: Path, config: str, form: str | None
) -> None:
    adapter = saved(tmp_path, config)
    assert form_of(adapter) == form
    for plain in (False, True):
        note = form_note({"sql": adapter}, "that answers", plain=plain)
        assert (note is not None) == (form is not None and (form == "messages") == plain)
    assert is_plain(adapter) == (form in ("prompt", "text", "instruction"))


def test_adapters_are_named_by_what_they_were_trained_on(tmp_path: Path) -> None:
    forms = {"a": "text", "b": "prompt", "c": "messages", "d": "text"}
    adapters = {name: saved(tmp_path, "", row_format=form) for name, form in forms.items()}
    said = "a, d were trained on plain text, and b was trained on prompts and completions: --plain"
    assert form_note(adapters, "--plain answers", plain=False) == f"{said} answers as trained"
    said = "c was trained on chats: a chat answers as trained"
    assert form_note(adapters, "a chat answers", plain=True) == said


CHAT = '[{"role": "%s", "content": "%s"}]'


@pytest.mark.parametrize(
    ("row", "options", "form"),
    [
        ('{"prompt": "two and two", "completion": " is four"}', {}, "prompt"),
        (
            f'{{"prompt": {CHAT % ("user", "2?")}, "completion": {CHAT % ("assistant", "4")}}}',
            {},
            "messages",
        ),
        ('{"instruction": "Add.", "input": "2 2", "output": "4"}', {}, "instruction"),
        ('{"instruction": "Add.", "output": "4"}', {"instruction_as_chat": True}, "messages"),
        ('{"prompt": "2?", "chosen": "4", "rejected": "5"}', {}, "prompt"),
        ('{"text": "two and two is four"}', {}, "text"),
    ],
)
def test_what_rows_are_is_what_is_written_of_them(
    tmp_path: Path, row: str, options: dict[str, Any], form: str
) -> None:
    """Not the names of their fields: prompts and completions, and Alpaca's rows, may be chats."""
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4)
    data = DataConfig(data=str(tmp_path / "rows.jsonl"), **options)
    assert load_rows(data, seed=0).form == form


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


def test_generate_says_of_an_adapter_that_it_was_trained_on_chats(tmp_path: Path) -> None:
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    chat = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]
    data.write_text(f"{json.dumps({'messages': chat})}\n" * 4)
    finetune(model="tiny", data=str(data), output_dir=str(run), max_steps=1, eval_fraction=0)
    asked = ["--adapter", str(run), "--prompt", "2?", "--max_new_tokens", "1"]
    said = "run was trained on chats: --chat answers as trained"
    for flags, expected in (([], [said]), (["--chat"], [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(parse("", "", GROUPS, [*asked, *flags]))
        assert [str(one.message) for one in caught] == expected


def test_generate_says_of_a_bare_prompt_that_alpacas_rows_were_none(tmp_path: Path) -> None:
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text('{"instruction": "Add.", "input": "2 2", "output": "4"}\n' * 4)
    finetune(model="tiny", data=str(data), output_dir=str(run), max_steps=1, eval_fraction=0)
    asked = ["--adapter", str(run), "--max_new_tokens", "1", "--prompt"]
    for prompt, said in (("Add.", True), ("### Instruction:\nAdd.\n\n### Response:\n", False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(parse("", "", GROUPS, [*asked, prompt]))
        notes = [str(one.message) for one in caught]
        assert ["was trained on Alpaca's instructions: a prompt in" in one for one in notes] == (
            [True] if said else []
        )


@pytest.mark.parametrize("as_chat", [True, False])
def test_an_export_is_verified_on_rows_in_the_form_of_the_run(
    tmp_path: Path, as_chat: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Add.", "output": "4"}\n' * 2)
    adapter = saved(tmp_path, f"instruction_as_chat: {str(as_chat).lower()}\n")
    assert asked_rows(str(tmp_path / "rows.jsonl"), adapter).is_chat == as_chat
