"""The speed benchmark runs, and its sides compute the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_speed_compares_the_same_computation(tmp_path):
    """Random weights give a loss near ln(vocabulary): bf16 moves it by less than 1 %."""
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    name = "speed_of_a_test"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py")]
    command += ["--shape", str(tmp_path / "shape.json"), "--bits", "4", "--level", "full"]
    command += ["--steps", "2", "--length", "32", "--rank", "4", "--result", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        result = json.loads(path.read_text())
    finally:
        path.unlink(missing_ok=True)
    found = result["4 bits"]
    sides = [f"{side}, full" for side in ("ours", "peft_guide", "peft_best")]
    for side in sides:
        assert found[side]["first_loss"] == pytest.approx(found[sides[0]]["first_loss"], rel=1e-2)
        assert found[side]["steps_bytes"] > found[side]["counted_bytes"] > 0
        assert found[side]["step_s"] > found["floor_full_s"] > found["floor_s"] > 0
        profile = found[side]["profile_s"]
        assert profile["aten::mm"] > 0
        assert sum(profile.values()) < 10 * found[side]["step_s"]
    assert set(found["ratios"]) == {
        f"{figure}: {sides[0]} / {peer}"
        for figure in ("tokens_per_s", "loading_bytes", "steps_bytes", "counted_bytes")
        for peer in sides[1:]
    }
    assert found["most"]["full"] == found[sides[1]]["step_s"] / found["floor_full_s"]
    assert {"torch", "peft"} <= set(result["measured"]["versions"])


def test_quality_begins_every_side_with_the_same_model():
    """The same bits and a B of zero: the losses differ by roundings to bf16, 2^-8 each at most."""
    name = "quality_of_a_test"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--data", "sample:query"]
    command += ["--bits", "4", "--targets", "all-linear", "--seeds", "42", "--steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [*command, "--result", name],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(path.read_text())
    finally:
        path.unlink(missing_ok=True)
        picture = path.with_suffix(".png")
        drawn = picture.exists() and picture.stat().st_size > 10_000
        picture.unlink(missing_ok=True)
    assert drawn == (importlib.util.find_spec("matplotlib") is not None)
    ours, peft = sorted(result["runs"], key=lambda run: run["side"])
    assert (ours["side"], peft["side"]) == ("ours", "peft")
    assert ours["loss_before"] == pytest.approx(peft["loss_before"], rel=2**-8)
    assert ours["loss"] < ours["loss_before"]
    (row,) = result["table"]
    assert row["mean"] == ours["loss"]
    assert row["difference"] == pytest.approx(ours["loss"] - peft["loss"])


def test_memory_plans_what_it_measures(tmp_path):
    """Components to the byte; the optimizer's step is planned with what comes and goes in it."""
    pytest.importorskip("matplotlib")
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    name = "memory_of_a_test"
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--result", name]
    command += ["--shape", str(tmp_path / "shape.json"), "--bits", "4", "--level", "full"]
    command += ["--batch", "2", "--length", "32", "--rank", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pictures = [path.with_suffix(".png"), path.with_name(f"{name}_step.png")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        settings = json.loads(path.read_text())["settings"]
        assert all(picture.stat().st_size > 10_000 for picture in pictures)
    finally:
        for one in (path, *pictures):
            one.unlink(missing_ok=True)
    sides = settings["4 bits, full"]
    planned, measured, peft = (sides[side] for side in ("planned", "measured", "peft"))
    for component in set(measured["bytes"]) - {"optimizer"}:
        assert planned["bytes"][component] == measured["bytes"][component], component
    assert planned["peak_at"] == measured["peak_at"]
    # Two matrices of rank 4 on each of q and v: PEFT trains the same ones.
    assert peft["bytes"]["adapters"] == measured["bytes"]["adapters"]
    assert peft["peak"] > measured["peak"]
    full = settings["full fine-tuning, full"]["planned"]["bytes"]
    assert full["gradients"] == pytest.approx(full["weights_other"], rel=1e-3)
    assert full["optimizer"] == pytest.approx(2 * full["weights_other"], rel=1e-2)
