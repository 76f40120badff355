"""What a run says of servers before it trains: of what was chosen, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trained import write_rows
from wrappers import save_wrapped

from qlora_kit.config.run import FINETUNE_GROUPS
from qlora_kit.device.target import processor_with
from qlora_kit.options.parsed import parse_values
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.request import read_request
from qlora_kit.run.resolve import resolve_run


class Notes(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def notes(tmp_path: Path, **options: Any) -> list[str]:
    """What is noted of a run before its rows are encoded."""
    options = {"model": "tiny", "data": write_rows(tmp_path / "rows.jsonl"), **options}
    reporter = Notes()
    parsed = parse_values({**options, "output_dir": tmp_path / "run"}, FINETUNE_GROUPS)
    with processor_with(torch.bfloat16):  # of one without there is a note of its own
        resolve_run(read_request(parsed), reporter)
    return reporter.said


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, []),
        ({"lora_r": 8, "target_modules": "all-linear"}, []),
        ({"lora_r": 24}, ["vLLM serves rank 24 with --max-lora-rank 32; its default is 16"]),
        ({"use_rslora": True}, ["llama.cpp's own converter does not read use_rslora"]),
    ],
)
def test_what_was_chosen_is_said(tmp_path: Path, options: dict[str, Any], starts: list) -> None:
    said = notes(tmp_path, **options)
    assert len(said) == len(starts)
    assert all(one.startswith(start) for one, start in zip(said, starts, strict=True))


@pytest.mark.parametrize("keys", ["wrapper", "text"])
def test_names_that_a_server_does_not_find_are_said(tmp_path: Path, keys: str) -> None:
    save_wrapped(tmp_path / "base", "gemma3")
    said = notes(tmp_path, model=tmp_path / "base", adapter_keys=keys)
    served = [note for note in said if "on a whole gemma3 checkpoint vLLM finds nothing" in note]
    assert len(served) == (keys == "text")
    assert said[-1].startswith(f"the base is named by a path of this machine, {tmp_path}/base, ")
    assert said[-1].endswith("export --format adapter --base_name OWNER/NAME names it for them")
