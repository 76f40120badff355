"""Every benchmark starts and finds what it imports; those of speed, quality and memory run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from benchmark import BENCHMARKS, run_benchmark
from warm_python import warm_python

SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
TINY = BENCHMARKS.parent / "qlora_kit/assets/tiny"
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


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *sorted(BENCHMARKS.glob("*/*.py"))], ids=lambda path: path.stem
)
def test_every_name_that_a_benchmark_imports_is_there(path):
    """Also those that are imported within functions, which `--help` does not reach."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("qlora_kit"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")


def test_a_benchmark_is_read_in_one_sitting():
    paths = [*SCRIPTS, *BENCHMARKS.glob("*/*.py")]
    lines = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count > 300} == {}


START = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, script
    else:
        raise AssertionError(f"{script} did its work")
"""


def test_no_benchmark_hides_a_package():
    """A script's own folder comes first: transformers looks whether there is a `kernels`, say."""
    taken = {*packages_distributions(), *sys.stdlib_module_names}
    taken |= {"kernels", "triton_kernels", "flash_attn", "xformers", "deepspeed", "accelerate"}
    assert sorted({one.stem for one in BENCHMARKS.iterdir()} & taken) == []


def test_every_benchmark_says_what_it_takes():
    scripts = [str(one) for one in SCRIPTS if "__main__" in one.read_text()]
    assert len(scripts) > 20
    command = [warm_python(), "-c", START, *scripts]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(scripts)


def test_speed_compares_the_same_computation(tmp_path):
    """Random weights give a loss near ln(vocabulary): bf16 moves it by less than 1 %."""
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    options = ["--shape", str(tmp_path / "shape.json"), "--bits", "4", "--level", "full"]
    options += ["--steps", "2", "--length", "32", "--rank", "4"]
    result = run_benchmark("speed", tmp_path, *options)
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


def test_quality_begins_every_side_with_the_same_model(tmp_path):
    """The same bits and a B of zero: the losses differ by roundings to bf16, 2^-8 each at most."""
    options = ["--data", "sample:query", "--bits", "4", "--targets", "all-linear"]
    options += ["--seeds", "42", "--steps", "3"]
    result = run_benchmark("quality", tmp_path, *options)
    picture = tmp_path / "quality.png"
    drawn = picture.exists() and picture.stat().st_size > 10_000
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
    options = ["--shape", str(tmp_path / "shape.json"), "--bits", "4", "--level", "full"]
    options += ["--batch", "2", "--length", "32", "--rank", "4"]
    result = run_benchmark("memory", tmp_path, *options)
    for picture in ("memory.png", "memory_step.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    settings = result["settings"]
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


def test_a_base_is_made_and_loaded_as_seven_billion_measures_it(tmp_path):
    """The steps that train and export are the commands themselves, which other tests run."""
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    (tmp_path / "work").mkdir()
    options = ["--config", tmp_path / "shape.json", "--tokenizer", TINY, "--bits", "8"]
    options += ["--work", tmp_path / "work", "--only", "load, shards", "--shards", "2"]
    result = run_benchmark("seven_billion", tmp_path, *options, warm=False)
    row = result["rows"]["8"]["load, shards"]
    assert len(list((tmp_path / "work/base-2").glob("*.safetensors"))) == 2
    assert row["peak_rss"] > row["imports"] > row["weights"] > 0
    assert row["wall_s"] > row["load_s"] > 0
    assert row["beside_weights"] == row["peak_rss"] - row["weights"]
    (limit,) = result["limits"]["8"]
    assert (limit["found"], limit["held"]) == (row["beside_weights"], True)


def test_a_limit_of_seven_billion_that_is_missed_or_a_step_that_fails_is_shown():
    parts = BENCHMARKS / "seven_parts"
    limits = runpy.run_path(str(parts / "limits.py"))["limits"]
    page = runpy.run_path(str(parts / "page.py"))
    loaded = {"load_s": 30.0, "tensors": "a", "beside_weights": 2**30}
    steps = {
        "imports": {"finetune": 2**29, "export": 2**29},
        "load, one file": loaded | {"weights": 30, "checkpoint": 100},
        "first start": loaded | {"weights": 30},
        "second start": loaded | {"weights": 30, "load_s": 3.0, "hash_s": 1.5, "tensors": "b"},
        "finetune": {"peak_rss": 2**30, "planned": 2**29},
        "kill and resume": {"killed": True, "equal_losses": True, "equal_adapters": True},
        "export": {"failed": "SystemExit"},
    }
    found = {(one["step"], one["what"]): one["held"] for one in limits(steps, 4)}
    assert found == {
        ("export", "ends well"): False,
        ("load, one file", "peak beside the weights"): True,
        ("load, one file", "weights beside those in bf16"): False,
        ("first start", "peak beside the weights"): True,
        ("second start", "peak beside the weights"): True,
        ("second start", "time beside reading and hashing"): False,
        ("second start", "times as fast as the first"): True,
        ("second start", "the same tensors as the first"): False,
        ("finetune", "peak beside plan and imports"): True,
        ("kill and resume", "the same losses and adapter"): True,
    }
    lines = page["limit_lines"]({"limits": {"4": limits(steps, 4)}})
    missed = [line for line in lines if "missed" in line]
    assert len(missed) == 4
    assert "**0.300, missed** | 0.290" in "".join(missed)
