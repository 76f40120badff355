"""Laws of `--skip_modules` over commands: an adapter's base is held as in its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import tree_hash
from safetensors import safe_open

Run = Callable[..., Any]
TRAINING = (
    "--bits 4 --dtype fp32 --max_steps 2 --save_steps 1 --eval_fraction 0.25 --token_cache none"
)


def finetune(run: Run, workshop: Any, *more: str) -> Any:
    given = ("--model", workshop.base, "--data", workshop.rows, "--output_dir", "out")
    return run("finetune", *given, *TRAINING.split(), *more)


@pytest.fixture
def trained(run: Run, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return finetune(run, workshop, "--skip_modules", "o_proj, down_proj")


def test_every_command_holds_an_adapters_base_as_in_training(run: Run, trained: Any) -> None:
    assert trained.code == 0, trained.err
    assert (
        "4 linears are not quantized, by --skip_modules: o_proj (2), down_proj (2)" in trained.out
    )
    assert yaml.safe_load(Path("out/config.yaml").read_text())["skip_modules"] == [
        "down_proj",
        "o_proj",
    ]
    with safe_open("out/adapter_model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["qlora_kit"])
    assert said["skip_modules"] == ["down_proj", "o_proj"]
    record = json.loads(Path("out/run.json").read_text())
    memory = record["memory"]
    for component in ("weights_quantized", "weights_other"):
        assert memory["measured"][component] == memory["planned"][component]

    # Nothing below is given the flag: the adapter says it.
    evaluated = run("evaluate", "--adapter", "out", "--no_exact_match", "--json")
    assert evaluated.code == 0, evaluated.err
    loss = json.loads(evaluated.out)["loss"]
    assert loss == pytest.approx(record["eval"]["loss_after"], rel=1e-6)
    exported = run("export", "--adapter", "out", "--output_dir", "merged", "--max_kl", "1e-6")
    assert exported.code == 0, exported.err
    assert (
        "4 linears are not quantized, by --skip_modules: o_proj (2), down_proj (2)" in exported.out
    )
    prompt = ("generate", "--adapter", "out", "--prompt", "count 3:", "--max_new_tokens", "4")
    assert run(*prompt).code == run(*prompt, "--bits", "16").code == 0
    more = ("--data", "sample", "--output_dir", "more", "--max_steps", "1", "--token_cache", "none")
    continued = run("finetune", "--adapter", "out", *more)
    assert continued.code == 0, continued.err
    assert yaml.safe_load(Path("more/config.yaml").read_text())["skip_modules"]


def test_another_skip_is_another_run(run: Run, workshop: Any, trained: Any) -> None:
    before = tree_hash(Path("out"))
    for skip in ("o_proj", "q_proj"):
        exported = run(
            "export", "--adapter", "out", "--output_dir", "merged", "--skip_modules", skip
        )
        assert exported.code == 2
        assert "was trained with skip_modules down_proj,o_proj" in exported.line
        resumed = finetune(
            run,
            workshop,
            "--skip_modules",
            skip,
            "--resume_from_checkpoint",
            "auto",
            "--max_steps",
            "4",
        )
        assert resumed.code == 2
        assert "skip_modules: ['down_proj', 'o_proj'] there" in resumed.line
    assert tree_hash(Path("out")) == before
