"""Laws of the commands on a multimodal checkpoint: its text decoder is the model, to the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import relative_error, token_ids
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrappers import save_wrapped

Run = Callable[..., Any]
TRAINING = (
    "--dtype fp32 --max_steps 2 --learning_rate 0.01 --eval_fraction 0 --max_length 32 "
    "--batch_size 4 --gradient_accumulation_steps 1 --token_cache none --bits"
)
WEIGHTS = "adapter_model.safetensors"
TRAINED = ("ministral3", "gemma3", "gemma4", "qwen3_5")
EXPORTED = "ministral3"
"""The others are exported in `tests/export`, without the command."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"say {n}:", "completion": f" {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(run: Run, bits: int, *more: str) -> Any:
    given = ("--model", "./base", "--data", "rows.jsonl", "--target_modules", "all-linear")
    return run("finetune", *given, *TRAINING.split(), str(bits), *more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=token_ids()).logits
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_is_planned_trained_and_exported(run: Run, home: Path, name: str) -> None:
    """The adapter on the class, and both exports, are one model; its plan is what is counted."""
    save_wrapped(home / "base", name)
    answer = finetune(run, 16, "--output_dir", "out", "--gradient_checkpointing", "full")
    assert answer.code == 0, answer.err
    assert "the text decoder alone is loaded" in answer.out + answer.err
    memory = json.loads((home / "out" / "run.json").read_text())["memory"]
    for part in ("weights", "adapters", "gradients", "optimizer", "activations"):
        assert memory["planned"][part] >= memory["measured"][part] > 0
    wrapper = AutoModelForImageTextToText.from_pretrained(home / "base")
    before = logits(wrapper)
    trained = logits(PeftModel.from_pretrained(wrapper, home / "out"))
    assert relative_error(before, trained) > 1e-3
    if name != EXPORTED:
        return
    for output, flag in (("text", ()), ("whole", ("--with_towers",))):
        answer = run("export", "--adapter", "out", "--output_dir", output, *flag)
        assert answer.code == 0, answer.err
    text = AutoModelForCausalLM.from_pretrained(home / "text")
    whole = AutoModelForImageTextToText.from_pretrained(home / "whole")
    assert relative_error(logits(text), trained) <= 1e-5
    assert torch.equal(logits(whole), logits(text))


def test_an_adapter_goes_on_and_answers(run: Run, home: Path) -> None:
    """In 4 bits, with the names of either class; the header and the card say which."""
    save_wrapped(home / "base", "mistral3")
    assert finetune(run, 4, "--output_dir", "out").code == 0
    more = ("--adapter_keys", "text", "--output_dir", "more")
    given = ("--data", "rows.jsonl", "--adapter", "out")
    answer = run("finetune", *given, *TRAINING.split()[:-1], *more)
    assert answer.code == 0, answer.err
    for directory, keys, start, said in (
        ("out", "wrapper", "base_model.model.model.language_model.layers.", "multimodal class"),
        ("more", "text", "base_model.model.model.layers.", "text model alone"),
    ):
        assert all(key.startswith(start) for key in load_file(home / directory / WEIGHTS))
        with safe_open(home / directory / WEIGHTS, "pt") as file:
            header = json.loads(file.metadata()["qlora_kit"])
        assert (header["adapter_keys"], header["wrapper"]) == (keys, "mistral3")
        assert said in (home / directory / "README.md").read_text()
        answer = run("generate", "--adapter", directory, "--prompt", "say", "--max_new_tokens", 3)
        assert answer.code == 0, answer.err
    answer = run("evaluate", "--adapter", "out", "--data", "rows.jsonl", "--no_exact_match")
    assert answer.code == 0, answer.err


def test_a_plan_needs_the_config_alone(run: Run, home: Path) -> None:
    save_wrapped(home / "base", "gemma3")
    given = ("--max_length", 32, "--device", "cpu", "--bits", 4, "--json")
    whole = run("plan", "--model", "./base", *given)
    (home / "config").mkdir()
    (home / "base" / "config.json").rename(home / "config" / "config.json")
    alone = run("plan", "--model", "./config/config.json", *given)
    assert alone.code == whole.code == 0, alone.err
    assert json.loads(alone.out)["bytes"] == json.loads(whole.out)["bytes"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--target_modules", ".*vision_tower.*q_proj"), "towers for other input than text"),
        (("--adapter_keys", "both"), "wrapper or text"),
    ],
)
def test_what_is_left_out_is_refused_in_one_line(
    run: Run, home: Path, given: tuple[str, ...], said: str
) -> None:
    save_wrapped(home / "base", "mistral3")
    answer = finetune(run, 4, "--output_dir", "out", *given)
    assert answer.code == 2
    assert said in answer.line
    assert not (home / "out").exists()
