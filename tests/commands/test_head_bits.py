"""Laws of `--head_bits` over commands: an adapter's head is held as in its training, or said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import save_checkpoint, token_ids
from safetensors import safe_open
from safetensors.torch import load_file
from trained import write_rows
from transformers import AutoModelForCausalLM

from qlora_kit.base.load import load_base
from qlora_kit.lora.adapter import load_adapter

Run = Callable[..., Any]
TRAINING = (
    "--bits 4 --dtype fp32 --max_steps 4 --save_steps 2 --eval_fraction 0.25 --token_cache none "
    "--gradient_accumulation_steps 2 --learning_rate 1e-2"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that ties its head to the embedding, one that does not, and rows."""
    folder = tmp_path_factory.mktemp("head")
    save_checkpoint(folder / "tied", "qwen2")
    save_checkpoint(folder / "untied", "llama2")
    write_rows(folder / "rows.jsonl")
    return folder


def finetune(run: Run, files: Path, base: str, out: str, *more: str) -> Any:
    given = ("--model", files / base, "--data", files / "rows.jsonl", "--output_dir", out)
    return run("finetune", *map(str, given), *TRAINING.split(), *more)


@pytest.mark.parametrize(("base", "bits"), [("tied", "4"), ("untied", "8")])
def test_every_command_holds_the_head_as_in_training(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, bits: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = finetune(run, files, base, "out", "--head_bits", bits)
    assert trained.code == 0, trained.err
    assert yaml.safe_load(Path("out/config.yaml").read_text())["head_bits"] == int(bits)
    with safe_open("out/adapter_model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["qlora_kit"])
    assert said["head_bits"] == int(bits)
    record = json.loads(Path("out/run.json").read_text())
    memory = record["memory"]
    for component in ("weights_quantized", "weights_other"):
        assert memory["measured"][component] == memory["planned"][component]
    assert f"the head in {bits} bits" in Path("out/README.md").read_text()

    # Nothing below is given the flag: the adapter says it.
    evaluated = run("evaluate", "--adapter", "out", "--no_exact_match", "--json")
    assert evaluated.code == 0, evaluated.err
    loss = json.loads(evaluated.out)["loss"]
    assert loss == pytest.approx(record["eval"]["loss_after"], rel=1e-6)
    prompt = ("generate", "--adapter", "out", "--prompt", "count 3:", "--max_new_tokens", "4")
    assert run(*prompt).code == run(*prompt, "--bits", "16").code == 0
    other = run("export", "--adapter", "out", "--output_dir", "no", "--head_bits", "16")
    assert other.code == 2
    assert f"was trained with head_bits {bits}" in other.line
    further = ("--resume_from_checkpoint", "auto", "--max_steps", "6", "--override", "max_steps")
    resumed = finetune(run, files, base, "out", *further)
    assert resumed.code == 2
    assert f"head_bits: {bits} there" in resumed.line

    exported = run("export", "--adapter", "out", "--output_dir", "merged", "--max_kl", "1e-6")
    assert exported.code == 0, exported.err
    check_export(base, files / base)
    original = ("--output_dir", "original", "--merge_base", "original")
    assert run("export", "--adapter", "out", *original).code == 0
    held = load_file("original/model.safetensors")
    exact = load_file(files / base / "model.safetensors")
    head = "lm_head.weight"
    assert torch.equal(held["model.embed_tokens.weight"], exact["model.embed_tokens.weight"])
    assert (head in held) is (head in exact)
    assert head not in held or torch.equal(held[head], exact[head])
    # A head that is not the embedding's any more is no tied model, in bitsandbytes' formats too.
    beside = ("--output_dir", "beside", "--format", "hf-4bit", "--max_kl", "1e-6")
    assert run("export", "--adapter", "out", *beside).code == 0
    held = load_file("beside/model.safetensors")
    assert torch.equal(held[head], load_file("merged/model.safetensors")[head])


def check_export(base: str, source: Path) -> None:
    """Plain transformers gives the logits of the model as trained; the embedding is exact."""
    config = json.loads(Path("merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    report = json.loads(Path("merged/export.json").read_text())
    (note,) = report["notes"]
    assert ("tie_word_embeddings false" in note) is (base == "tied")
    held, files = load_file("merged/model.safetensors"), load_file(source / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    assert torch.equal(held[embedding], files[embedding])
    plain = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    assert not torch.equal(plain.get_input_embeddings().weight, plain.lm_head.weight)
    said = {"head_bits": report["base"]["head_bits"]}
    ours = load_base(str(source), bits=4, dtype="fp32", device="cpu", **said)
    load_adapter(ours, "out")
    ids = token_ids()
    with torch.no_grad():
        expected, found = ours.model.eval()(ids).logits, plain(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_embedding_on_the_host_changes_nothing_of_a_run(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kill in the middle: a run goes on from its checkpoint, the embedding elsewhere."""
    monkeypatch.chdir(tmp_path)
    # Rates that do not depend on the number of steps, so that a run can end early and go on.
    dropout = [
        "--lora_dropout",
        "0.1",
        "--packing",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
    ]
    assert finetune(run, files, "untied", "here", *dropout).code == 0
    on_host = (*dropout, "--offload_embedding")
    half = finetune(run, files, "untied", "there", *on_host, "--max_steps", "2")
    assert half.code == 0, half.err
    further = ("--resume_from_checkpoint", "auto", "--override", "max_steps")
    more = finetune(run, files, "untied", "there", *on_host, *further)
    assert more.code == 0, more.err
    here, there = (load_file(f"{one}/adapter_model.safetensors") for one in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(torch.equal(there[name], one) for name, one in here.items())
    tied = finetune(run, files, "tied", "tied", "--offload_embedding", "--max_steps", "1")
    assert tied.code == 0, tied.err
    assert "the embedding stays on the device, for the head shares it" in " ".join(
        (tied.out + tied.err).split()
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("3", "head_bits must be"),
        ("16 --bits 3", "bits must be"),
        ("4 --bits 16", "head_bits 4 goes with bits 4 or 8"),
    ],
)
def test_wrong_head_bits_are_refused(run: Run, given: str, said: str) -> None:
    refused = run("finetune", "--head_bits", *given.split())
    assert refused.code == 2
    assert said in refused.line
