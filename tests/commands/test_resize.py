"""Laws of `--resize_embeddings`: rows for tokens that the embedding lacks, the same ones each time.

A row that is added is the mean of those in the files and frozen; whatever the adapter is used for
afterwards finds the same rows, without the flag.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import (
    QUANTIZED,
    VOCABULARY,
    save_checkpoint,
    save_quantized,
    save_tokenizer,
    token_ids,
    tree_hash,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base.load import load_base
from qlora_kit.errors import TokenizerError

Run = Callable[..., Any]
EXTRA = 5
TOKENS = 260 + EXTRA  # one more than the embedding has rows
TRAINING = "--bits 4 --dtype fp32 --max_steps 3 --learning_rate 0.01 --eval_fraction 0.25"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose tokenizer has five tokens more, and rows that use the last of them."""
    save_checkpoint(tmp_path / "base", "llama_bias", torch.bfloat16)
    save_tokenizer(tmp_path / "base", extra=EXTRA)
    rows = [{"prompt": f"say {n}:", "completion": f" <extra4> {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(run: Run, *more: str) -> Any:
    given = ("--model", "./base", "--data", "rows.jsonl", "--output_dir", "out")
    return run("finetune", *given, *TRAINING.split(), *more, "--token_cache", "none")


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2", "phi3"])
def test_new_rows_are_the_mean_and_old_ones_stay(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path, family)
    small = load_base(str(tmp_path), bits=16, dtype="fp32")
    before = small.model
    save_tokenizer(tmp_path, extra=EXTRA)
    with pytest.raises(TokenizerError, match=rf"{TOKENS} tokens, {VOCABULARY} .*resize_embedd"):
        load_base(str(tmp_path), bits=16, dtype="fp32")
    base = load_base(str(tmp_path), bits=16, dtype="fp32", resize_embeddings=True)
    model = base.model
    assert len(base.tokenizer) == TOKENS == model.config.vocab_size == base.info.embedding_rows
    assert base.info.fingerprint == small.info.fingerprint
    for module, other in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert torch.equal(module.weight[:VOCABULARY], other.weight)
        mean = other.weight.double().mean(0).float()
        torch.testing.assert_close(module.weight[VOCABULARY], mean, rtol=1e-6, atol=1e-9)
        assert not module.weight.requires_grad
    with torch.no_grad():
        ids = token_ids()
        ours, theirs = model(ids).logits, before(ids).logits
    # The products of another number of columns may be summed in another order.
    torch.testing.assert_close(ours[..., :VOCABULARY], theirs, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_a_base_that_is_quantized_already_is_resized_too(tmp_path: Path, kind: str) -> None:
    save_checkpoint(tmp_path / "base", "llama2", torch.bfloat16)
    save_quantized(tmp_path / "base", tmp_path / kind, **QUANTIZED[kind])
    save_tokenizer(tmp_path / kind, extra=EXTRA)
    model = load_base(str(tmp_path / kind), resize_embeddings=True).model
    assert model(torch.tensor([[3, TOKENS - 1]])).logits.shape == (1, 2, TOKENS)


def test_the_flag_changes_nothing_where_there_are_rows_enough(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    plain = load_base(str(tmp_path), bits=16)
    base = load_base(str(tmp_path), bits=16, resize_embeddings=True)
    assert base.info == plain.info
    assert base.model.get_input_embeddings().num_embeddings == VOCABULARY


def test_without_the_flag_it_is_refused_and_named(run: Run, home: Path) -> None:
    before = tree_hash(home)
    answer = finetune(run)
    assert answer.code == 3
    assert f"{TOKENS} tokens, {VOCABULARY} embedding rows" in answer.line
    assert "--resize_embeddings" in answer.line
    assert tree_hash(home) == before


def test_an_adapter_finds_the_rows_it_was_trained_with(run: Run, home: Path) -> None:
    answer = finetune(run, "--resize_embeddings")
    assert answer.code == 0, answer.err
    assert f"the embedding has {TOKENS} rows" in answer.out
    assert yaml.safe_load((home / "out" / "config.yaml").read_text())["resize_embeddings"] is True
    with safe_open(home / "out" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["qlora_kit"])["embedding_rows"] == TOKENS
    record = json.loads((home / "out" / "run.json").read_text())
    memory = record["memory"]
    assert memory["measured"]["weights_other"] == memory["planned"]["weights_other"]

    # The card's lines give the base these rows too.
    [code] = re.findall(r"```python\n(.*?)```", (home / "out" / "README.md").read_text(), re.DOTALL)
    done: dict[str, Any] = {}
    exec(code.replace("ADAPTER", str(home / "out")), done)
    rows = done["model"].get_input_embeddings().weight
    assert len(rows) == len(done["model"].get_output_embeddings().weight) == TOKENS
    mean = rows[:VOCABULARY].double().mean(0).to(rows.dtype)
    torch.testing.assert_close(rows[VOCABULARY].detach(), mean.detach(), rtol=0.05, atol=1e-2)

    # Nothing below is given the flag: the adapter says it.
    evaluated = run("evaluate", "--adapter", "out", "--no_exact_match", "--json")
    assert evaluated.code == 0, evaluated.err
    loss = json.loads(evaluated.out)["loss"]
    assert loss == pytest.approx(record["eval"]["loss_after"], rel=1e-6)
    generated = ("generate", "--adapter", "out", "--prompt", "say 3:", "--max_new_tokens", "4")
    assert run(*generated).code == 0
    assert run(*generated).out == run(*generated).out

    exported = run("export", "--adapter", "out", "--output_dir", "merged", "--max_kl", "1e-3")
    assert exported.code == 0, exported.err
    model = AutoModelForCausalLM.from_pretrained(home / "merged")
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == TOKENS
    # Nor does the export need it.
    weights = load_file(home / "merged" / "model.safetensors")
    expected = load_base("./base", bits=16, dtype="fp32", resize_embeddings=True).model
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights[name], expected.get_parameter(name))
    plain = run("evaluate", "--model", "./merged", "--bits", "16", "--data", "rows.jsonl",
                "--no_exact_match")  # fmt: skip
    assert plain.code == 0, plain.err


def test_a_run_goes_on_with_the_same_rows(run: Run, home: Path) -> None:
    assert finetune(run, "--resize_embeddings", "--save_steps", "2").code == 0
    whole = (home / "out" / "adapter_model.safetensors").read_bytes()
    for path in (home / "out").iterdir():
        if path.name != "checkpoint-2":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert finetune(run, "--resize_embeddings", "--save_steps", "2",
                    "--resume_from_checkpoint", "auto").code == 0  # fmt: skip
    assert (home / "out" / "adapter_model.safetensors").read_bytes() == whole
    # A new run from the adapter takes the rows as its base's.
    more = ("--data", "rows.jsonl", "--output_dir", "more", "--max_steps", "1")
    answer = run("finetune", "--adapter", "out", *more, "--token_cache", "none")
    assert answer.code == 0, answer.err
    assert yaml.safe_load((home / "more" / "config.yaml").read_text())["resize_embeddings"] is True


def test_another_number_of_rows_is_another_base(run: Run, home: Path) -> None:
    assert finetune(run, "--resize_embeddings").code == 0
    save_tokenizer(home / "base", extra=EXTRA + 1)
    before = tree_hash(home)
    command = ("generate", "--adapter", "out", "--prompt", "a", "--max_new_tokens", "1")
    answer = run(*command)
    assert answer.code == 3
    assert f"was trained with {TOKENS} embedding rows, and here are {TOKENS + 1}" in answer.line
    assert tree_hash(home) == before
    assert run(*command, "--allow_other_base").code == 0
