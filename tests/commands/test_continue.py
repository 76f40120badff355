"""Laws of `finetune --adapter`: it goes on where an adapter stands, on the base that it is of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import edit_weights, randomize_adapter, tree_hash
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import ConfigError
from qlora_kit.lora.inject import inject_lora

Run = Callable[..., Any]
DATA = ("--data", "rows.jsonl", "--eval_data", "held.jsonl")
STEPS = "--batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-2 --max_steps 4"
SETTINGS = (*DATA, *STEPS.split(), "--gradient_checkpointing", "none", "--dtype", "fp32")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def home(tmp_path: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: a base, an adapter of all linears on it in 4 bits, and rows."""
    shutil.copytree(workshop.base, tmp_path / "base")
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    shutil.copy(workshop.rows, tmp_path / "rows.jsonl")
    held = workshop.rows.read_text().splitlines(keepends=True)[:5]
    (tmp_path / "held.jsonl").write_text("".join(held))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def go_on(run: Run, home: Path) -> Run:
    """Run finetune with an adapter; its options come last."""

    def call(*more: object, adapter: str = "adapter") -> Any:
        return run("finetune", "--model", "./base", *SETTINGS, "--adapter", adapter, *more)

    return call


def save_pefts(home: Path, **options: Any) -> Path:
    """An adapter made and saved by PEFT on the base in 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    made = get_peft_model(model, PeftConfig(task_type="CAUSAL_LM", **options))
    randomize_adapter(made, scale=0.05)
    made.save_pretrained(home / "pefts")
    return home / "pefts"


def losses(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "run.json").read_text())["eval"]
    return found


def evaluated(run: Run, *arguments: object) -> float:
    answer = run(
        "evaluate", "--model", "./base", "--dtype", "fp32", "--data", "held.jsonl", *arguments,
        "--no_exact_match", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return float(json.loads(answer.out)["loss"])


def test_it_starts_where_the_adapter_stands_and_gets_better(
    run: Run, go_on: Run, home: Path
) -> None:
    before = tree_hash(home / "adapter")
    answer = go_on("--output_dir", "out")
    assert answer.code == 0, answer.err
    found = losses(home / "out")
    # The sums of the same numbers: only their order in a batch may differ.
    assert found["loss_before"] == pytest.approx(evaluated(run, "--adapter", "adapter"), rel=1e-6)
    assert found["loss_before"] != pytest.approx(evaluated(run, "--bits", "4"), rel=1e-3)
    assert found["loss_after"] == pytest.approx(evaluated(run, "--adapter", "out"), rel=1e-6)
    assert found["loss_after"] < found["loss_before"]
    assert tree_hash(home / "adapter") == before
    assert load_file(home / "out" / WEIGHTS).keys() == load_file(home / "adapter" / WEIGHTS).keys()


def test_the_base_and_the_settings_are_the_adapters_where_they_are_not_given(
    run: Run, home: Path
) -> None:
    first = ("--bits", "8", "--lora_r", "3", "--lora_alpha", "5", "--use_rslora")
    assert run("finetune", "--model", "./base", *SETTINGS, *first, "--output_dir", "a").code == 0
    answer = run("finetune", *SETTINGS, "--adapter", "a", "--output_dir", "b")
    assert answer.code == 0, answer.err
    one, two = (yaml.safe_load((home / name / "config.yaml").read_text()) for name in "ab")
    assert two.pop("adapter") == "a"
    assert len(two.pop("adapter_fingerprint")) == 64
    assert sorted(two.pop("target_modules")) == ["q_proj", "v_proj"]
    for config in (one, two):
        del config["output_dir"]
        config.pop("target_modules", None)
    assert two == one
    # What the run wrote is a config that makes it again.
    assert run("finetune", "--config", "b/config.yaml", "--output_dir", "c").code == 0
    assert (home / "c" / WEIGHTS).read_bytes() == (home / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 10},
        },
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=["names", "rslora", "patterns", "layers"],
)
def test_an_adapter_that_peft_made_goes_on(
    run: Run, go_on: Run, home: Path, options: dict[str, Any]
) -> None:
    pefts = save_pefts(home, **options)
    answer = go_on("--bits", "16", "--output_dir", "out", "--save_steps", "2", adapter="pefts")
    assert answer.code == 0, answer.err
    start = evaluated(run, "--bits", "16", "--adapter", "pefts")
    assert losses(home / "out")["loss_before"] == pytest.approx(start, rel=1e-6)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(place / WEIGHTS).items()}
        for place in (pefts, home / "out")
    ]
    assert shapes[0] == shapes[1]
    after = evaluated(run, "--bits", "16", "--adapter", "out")
    assert losses(home / "out")["loss_after"] == pytest.approx(after, rel=1e-6)
    resumed(go_on, home, "--bits", "16", adapter="pefts")


def resumed(go_on: Run, home: Path, *more: object, adapter: str = "adapter") -> None:
    """A run that goes on from `out/checkpoint-2` without the adapter ends in the same bytes."""
    shutil.copytree(home / "out" / "checkpoint-2", home / "again" / "checkpoint-2")
    (home / adapter).rename(home / "gone")
    resume = ("--output_dir", "again", "--resume_from_checkpoint", "auto", "--save_steps", "2")
    answer = go_on(*more, *resume, adapter=adapter)
    (home / "gone").rename(home / adapter)
    assert answer.code == 0, answer.err
    assert "going on from" in answer.out
    for name in (WEIGHTS, "adapter_config.json"):
        assert (home / "again" / name).read_bytes() == (home / "out" / name).read_bytes()


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_a_resumed_run_ends_in_the_same_bytes_without_the_adapter(
    go_on: Run, home: Path, dropout: str
) -> None:
    more = ("--lora_dropout", dropout, "--adapter_dtype", "bf16")
    assert go_on(*more, "--output_dir", "out", "--save_steps", "2").code == 0
    assert json.loads((home / "out" / "adapter_config.json").read_text())["lora_dropout"] == float(
        dropout
    )
    resumed(go_on, home, *more)


def test_the_base_that_is_not_given_is_the_checkpoints_once_the_adapter_is_gone(
    run: Run, go_on: Run, home: Path
) -> None:
    assert go_on("--output_dir", "out", "--save_steps", "2").code == 0
    shutil.copytree(home / "out" / "checkpoint-2", home / "again" / "checkpoint-2")
    shutil.rmtree(home / "adapter")
    resume = ("--output_dir", "again", "--resume_from_checkpoint", "auto")
    answer = run("finetune", *SETTINGS, "--adapter", "adapter", *resume)
    assert answer.code == 0, answer.err
    assert (home / "again" / WEIGHTS).read_bytes() == (home / "out" / WEIGHTS).read_bytes()


@pytest.fixture
def refuses(go_on: Run, home: Path) -> Callable[..., str]:
    """Go on in a way that must be refused, with everything left as it is; the error line."""

    def check(*more: object, code: int = ConfigError.exit_code, **options: Any) -> str:
        before = tree_hash(home)
        answer = go_on(*more, **options)
        assert answer.code == code, answer.err
        assert tree_hash(home) == before
        line = str(answer.line)
        assert line.startswith("error: ")
        assert len(line) <= 400
        return line

    return check


CONFLICTS = {
    "--lora_r 8": "--lora_r 8 is given, and adapter has 4; leave --lora_r out",
    "--lora_alpha 7": "--lora_alpha 7.0 is given, and adapter has 6",
    "--use_rslora": "--use_rslora True is given, and adapter has False",
    "--lora_r 8 --lora_alpha 7": "has 6; leave --lora_r, --lora_alpha out",
    "--target_modules q_proj": "--target_modules q_proj is given, and adapter adapts down_proj, ",
    "--target_modules auto": "--target_modules auto is given, and adapter adapts",
    "--target_modules nope": "target_modules 'nope' matches no linear",
    "--bits 8": "--bits 8 is given, and adapter was trained with bits 4",
    "--quant_type fp4": "--quant_type fp4 is given, and adapter was trained with quant_type nf4",
    "--no_double_quant": "--double_quant False is given, and adapter was trained with",
    "--adapter_fingerprint " + "0" * 64: "--adapter_fingerprint 000",
    "--adapter_fingerprint xyz": "adapter_fingerprint must be 64 hex digits, got xyz",
}


@pytest.mark.parametrize("flags", CONFLICTS)
def test_what_contradicts_the_adapter_is_refused(refuses: Callable[..., str], flags: str) -> None:
    assert CONFLICTS[flags] in refuses(*flags.split(), "--output_dir", "out")


@pytest.mark.parametrize("place", ["adapter", "adapter/inside", "."])
def test_an_output_over_the_adapter_is_refused(refuses: Callable[..., str], place: str) -> None:
    line = refuses("--output_dir", place, "--overwrite")
    assert f"--output_dir {place} overlaps with" in line


def test_what_says_the_same_is_no_conflict(go_on: Run) -> None:
    same = "--lora_r 4 --lora_alpha 6 --no_use_rslora --target_modules all-linear --bits 4"
    answer = go_on(*same.split(), "--output_dir", "out", "--lora_dropout", "0.1")
    assert answer.code == 0, answer.err


def test_another_base_of_the_same_shape_is_refused_unless_it_is_allowed(
    refuses: Callable[..., str], go_on: Run, home: Path
) -> None:
    edit_weights(home / "base", lambda tensors: tensors["lm_head.weight"].fill_(0.01))
    line = refuses("--output_dir", "out", code=3)
    assert "was trained on base with other weights than base" in line
    assert "--allow_other_base" in line
    assert go_on("--output_dir", "out", "--allow_other_base").code == 0
    assert go_on("--output_dir", "eight", "--allow_other_base", "--bits", "8").code == 0
    config = yaml.safe_load((home / "eight" / "config.yaml").read_text())
    assert (config["bits"], config["allow_other_base"]) == (8, True)


def test_an_adapter_that_is_missing_or_spoilt_is_refused(
    refuses: Callable[..., str], home: Path
) -> None:
    assert "nowhere: no such directory" in refuses("--output_dir", "out", adapter="nowhere", code=3)
    tensors = load_file(home / "adapter" / WEIGHTS)
    (home / "adapter" / WEIGHTS).unlink()
    assert f"holds no {WEIGHTS}" in refuses("--output_dir", "out", code=3)
    save_file(dict(list(tensors.items())[1:]), home / "adapter" / WEIGHTS)
    assert "lacks 1 tensors" in refuses("--output_dir", "out", code=3)


def test_a_run_of_another_adapter_is_not_resumed(
    refuses: Callable[..., str], go_on: Run, run: Run, home: Path
) -> None:
    assert go_on("--output_dir", "out", "--save_steps", "2").code == 0
    shutil.copytree(home / "out" / "checkpoint-2", home / "again" / "checkpoint-2")
    resume = ("--output_dir", "again", "--resume_from_checkpoint", "auto")
    shutil.copytree(home / "out", home / "other", ignore=shutil.ignore_patterns("checkpoint-*"))
    # The same shapes, and other weights.
    line = refuses(*resume, adapter="other")
    assert "is of a run that differs from this one: adapter_fingerprint: " in line
    assert "adapter_fingerprint cannot change" in line
    refuses(*resume, "--override", "adapter_fingerprint", adapter="other")
    before = tree_hash(home)
    answer = run("finetune", "--model", "./base", *SETTINGS, *resume)
    assert answer.code == 2
    assert "adapter_fingerprint: " in answer.line
    assert tree_hash(home) == before


def test_options_of_an_adapter_need_one(run: Run, home: Path) -> None:
    base = ("finetune", "--model", "./base", *SETTINGS, "--output_dir", "out")
    for flags in (("--allow_other_base",), ("--adapter_fingerprint", "0" * 64)):
        answer = run(*base, *flags)
        assert answer.code == 2
        assert f"{flags[0][2:]} goes with adapter, which is not given" in answer.line


def test_new_adapters_are_not_made_where_one_is_named() -> None:
    with pytest.raises(ConfigError, match="use load_adapter and train_loaded"):
        inject_lora(torch.nn.Module(), LoRAConfig(adapter="somewhere"))
