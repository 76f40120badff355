"""The way from a command to the optimizer, as a reader of the code goes it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_kit

PACKAGE = Path(qlora_kit.__file__).parent


def test_from_finetune_to_the_optimizers_step_are_three_calls_in_two_files(
    run: Callable[..., Any], workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks, real = [], torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        stacks.append([frame for frame in frames if frame[0].is_relative_to(PACKAGE)])
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    answer = run(
        "finetune", "--model", workshop.base, "--data", workshop.rows,
        "--output_dir", tmp_path / "out", "--max_steps", "1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    way = stacks[-1]
    names = [name for _, name in way]
    start = len(names) - 1 - names[::-1].index("main")
    assert names[start:] == ["main", "train", "train_step"]  # whose last call is the step
    assert len({path for path, _ in way[start:]}) == 2
