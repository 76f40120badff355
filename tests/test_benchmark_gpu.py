"""The benchmark for a card, on the CPU: some of its parts run, and what goes wrong is noted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark import BENCHMARKS
from warm_python import warm_python

from qlora_kit.base.safetensors_file import TensorEntry

sys.path.insert(0, str(BENCHMARKS))

import gpu
import gpu_table
import random_checkpoint
import record
import step_profile
from gpu_parts import PARTS, Part, child, chosen
from gpu_parts.setting import Setting
from gpu_parts.shapes import PLANNED, SHAPES, shape_of


def test_parts_run_one_after_another_and_the_result_says_what_was_left_out(tmp_path: Path) -> None:
    command = [warm_python(), str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small"]
    command += ["--output", str(tmp_path), "--parts", "start,5,10"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [*result["parts"]] == ["start", "loading", "optimizers"]
    assert not [one["failed"] for one in result["parts"].values() if "failed" in one]
    assert result["parts"]["loading"]["held_bytes"] > 0
    assert all(one["equal"] for one in result["parts"]["optimizers"]["restored"].values())
    assert (result["device"], result["small"], result["left_out"]) == ("cpu", True, {})
    assert "commit" in result["measured"]
    lines = [line for line in done.stdout.splitlines() if re.match(r"\d+ \w+ \(\d+ s\): ", line)]
    assert len(lines) == 3


def test_a_part_that_raises_or_takes_too_long_is_noted_beside_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(setting: Any, found: dict[str, Any]) -> str:
        found["first"] = 1
        raise ValueError("of no value")

    def hangs(setting: Any, found: dict[str, Any]) -> str:
        found["first"] = 1
        while True:
            time.sleep(0.01)

    for run, said in ((raises, "ValueError: of no value"), (hangs, "TooLongError: not done")):
        monkeypatch.setitem(sys.modules, "gpu_parts.tried", SimpleNamespace(run=run))
        found: dict[str, Any] = {}
        gpu.run_part(Part(0, "tried", 1, 1, ""), None, found, time.time())
        assert found["first"] == 1
        assert said in found["line"]
        assert said in found["failed"]


def test_a_part_whose_process_ends_is_noted_and_not_tried_again(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    running = {"name": "kernels", "until": time.time(), "found": {}}
    gpu.write(result, {"parts": {"start": {}}, "left_out": {}, "running": running})
    process = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True
    )
    assert gpu.watch(process, result, time.time() + 60) == 7
    found = gpu.read(result)
    assert "running" not in found
    assert "ended with 7" in found["parts"]["kernels"]["failed"]


def test_a_part_that_does_not_answer_is_ended_with_its_process(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    running = {"name": "kernels", "until": time.time() - gpu.GRACE - 1, "found": {}}
    gpu.write(result, {"parts": {}, "left_out": {}, "running": running})
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, start_new_session=True)
    assert gpu.watch(process, result, time.time() + 60) < 0
    assert "failed" in gpu.read(result)["parts"]["kernels"]


def test_without_a_card_nothing_is_tried(tmp_path: Path) -> None:
    command = [warm_python(), str(BENCHMARKS / "gpu.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == gpu.NO_CARD
    assert done.stdout.startswith("error: no CUDA device")
    assert not (tmp_path / "gpu.json").exists()


def test_what_a_process_of_its_own_found_is_kept_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import sys\n"
        "path = sys.argv[sys.argv.index('--output') + 1]\n"
        "open(path, 'w').write('{\"first\": 1}')\n"
        "sys.exit('no more memory')\n"
    )
    monkeypatch.setattr(child, "RUNNER", runner)
    setting = Setting(torch.device("cpu"), True, None, tmp_path)
    found: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="no more memory"):
        child.in_child(setting, found, "shortage", 600, {})
    assert found == {"first": 1}


def test_parts_are_chosen_by_number_or_name_and_run_in_their_own_order() -> None:
    assert [part.number for part in chosen("9, kernels,1")] == [1, 2, 9]
    assert chosen(None) == list(PARTS)
    with pytest.raises(ValueError, match="no part 99"):
        chosen("1,99")
    assert len({part.number for part in PARTS}) == len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert (BENCHMARKS / "gpu_parts" / f"{part.name}.py").exists()
    assert sum(part.seconds for part in PARTS) < 8 * 60


def test_points_have_names_of_their_own_and_small_models_their_form() -> None:
    assert len({point.name for point in PLANNED}) == len(PLANNED)
    for name, whole in SHAPES.items():
        small = shape_of(name, small=True)
        assert small.keys() == whole.keys()
        assert whole["num_attention_heads"] % small["num_attention_heads"] == 0
        for config in (whole, small):
            assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_no_program_git_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.provenance()["commit"] is None


@pytest.mark.parametrize("length", [3, 1_048_583 + 5])
def test_noise_repeats_a_tile_and_reads_as_a_file_would(length: int) -> None:
    noise = random_checkpoint.Noise()
    filled = noise.fill(torch.empty(length, 2, dtype=torch.bfloat16))
    entry = TensorEntry("w", "BF16", (length, 2), Path("w"), 0, 4 * length)
    read = torch.empty(4 * length, dtype=torch.uint8)
    noise(entry, read)
    assert torch.equal(read.view(torch.bfloat16).view(length, 2), filled)
    for start, end in ((0, 2 * length), (2 * length, 4 * length)):
        piece = torch.empty(end - start, dtype=torch.uint8)
        noise(replace(entry, start=start, end=end), piece)
        assert torch.equal(piece, read[start:end])
    flat, tile = filled.view(-1), random_checkpoint.TILE
    if flat.numel() > tile:
        assert torch.equal(flat[tile:], flat[: flat.numel() - tile])
        # 0.02 within the error of a million draws.
        assert abs(float(flat.float().std()) / random_checkpoint.STD - 1) < 0.01
    assert torch.equal(noise.fill(torch.empty(5)), torch.ones(5))


class Event:
    """What of a profiler's event is read."""

    def __init__(self, key: str, kind: Any, seconds: float) -> None:
        self.key, self.device_type, self.count = key, kind, 1
        self.self_device_time_total = 1e6 * seconds


def test_a_kernel_is_counted_once_and_not_again_with_its_operator() -> None:
    kinds = torch.autograd.DeviceType
    events = [Event("aten::mm", kinds.CPU, 2.0), Event("gemm_kernel", kinds.CUDA, 2.0)]
    assert [one.key for one in events if step_profile.on_device(one)] == ["gemm_kernel"]


def test_the_pages_say_what_a_card_showed_or_that_none_did() -> None:
    there = gpu_table.RESULT.exists()
    result = json.loads(gpu_table.RESULT.read_text()) if there else None
    for page, text_of in gpu_table.PAGES.items():
        marked = gpu_table.MARKS.search(page.read_text())
        assert marked is not None, page
        assert marked[0] == f"<!-- cuda -->\n{text_of(result)}<!-- /cuda -->"


def test_the_tables_have_the_figures_of_a_result() -> None:
    step = "llama3.1-8b, 1 x 2048, none"
    point = {"planned_bytes": 12.5e9, "allocated_bytes": 12.4e9, "reserved_bytes": 13e9}
    ours, best, guide = ({"tokens_per_s": number} for number in (3000.0, 2000.0, 1500.0))
    parts = {
        "memory": {"points": {step: {**point, "error": 0.0081}}},
        "speed": {"points": {step: ours}},
        "peft": {"peft_guide, full": guide, "peft_best, none": best},
        "decode": {"1 rows": {"tokens_per_s": 80.0}, "8 rows": {"tokens_per_s": 512.0}},
        "start": {"card": {"name": "NVIDIA X"}},
    }
    result = {"device": "cuda", "small": False, "parts": parts}
    text = gpu_table.short(result)
    row = "| llama3.1-8b | none | 12.50 GB | 12.40 GB | 3,000 | 1,500 (x 2.00) | 2,000 (x 1.50) |"
    assert row in text
    assert "| llama2-7b | full | - | - | - | - | - |" in text
    assert "one NVIDIA X" in text
    assert "80 with 1 row, 512 with 8 rows" in text
    assert "0.8%" in text
    assert len(text.splitlines()) <= 8
    assert f"| {step} | 12.50 GB | 12.40 GB | 13.00 GB |" in gpu_table.whole(result)
    with pytest.raises(ValueError, match="not that of a card"):
        gpu_table.short({**result, "device": "cpu"})
