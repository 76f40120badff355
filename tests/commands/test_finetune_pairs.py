"""Laws of `finetune --method dpo`: what it writes, resumes and refuses."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from families import save_checkpoint
from safetensors.torch import load_file

from qlora_kit.commands.evaluate import main as evaluate
from qlora_kit.commands.finetune import main
from qlora_kit.commands.plan import main as plan
from qlora_kit.commands.show_data import main as show_data

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments that name a tiny base and pairs, of which a share is held out."""
    place = tmp_path_factory.mktemp("pairs")
    save_checkpoint(place / "base")
    draw = random.Random(1)
    with open(place / "pairs.jsonl", "w") as file:
        for _ in range(24):
            words = [f"w{draw.randint(3, 90)}" for _ in range(draw.randint(3, 6))]
            row = {
                "prompt": " ".join(words),
                "chosen": f" {words[0]}",
                "rejected": f" {words[-1]} w1",
            }
            file.write(json.dumps(row) + "\n")
    settings = (
        "--method dpo --bits 4 --dtype fp32 --lora_r 4 --batch_size 2 --max_length 96 "
        f"--gradient_accumulation_steps 2 --max_steps {STEPS} --eval_fraction 0.25 "
        "--learning_rate 3e-3 --logging_steps 1 --seed 3 --token_cache none --no_base_cache"
    )
    data = place / "pairs.jsonl"
    return ["--model", str(place / "base"), "--data", str(data), *settings.split()]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main([*inputs, "--save_steps", "3", "--output_dir", str(output)]) == 0
    return output


def references(checkpoint):
    """What a checkpoint keeps of the reference."""
    (state,) = (one for one in checkpoint.glob("*.safetensors") if "adapter" not in one.name)
    return {k: v for k, v in load_file(state).items() if k.startswith("reference.")}


def record(directory):
    return json.loads((directory / "run.json").read_text())


def metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(one).items() if "second" not in k} for one in lines]


def test_the_margin_of_held_out_pairs_rises(finished):
    run, lines = record(finished), metrics(finished)
    found = run["eval"]
    assert (found["margin_before"], found["accuracy_before"]) == (0, 0)
    assert found["margin_after"] > 0
    assert found["loss_after"] < found["loss_before"]
    assert run["data"]["rows"] == 18
    assert len(lines) == STEPS
    assert all({"loss", "margin", "accuracy"} <= line.keys() for line in lines)
    assert "measures" not in lines[0]
    assert run["config"]["beta"] == 0.1
    planned, measured = run["memory"]["planned"]["peak"], run["memory"]["measured"]["peak"]
    assert measured <= planned <= 1.05 * measured
    assert "margin was 0.0000" in (finished / "README.md").read_text()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(inputs, finished, tmp_path, capsys):
    """Its reference is in the checkpoint, and is not computed again."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(finished / "checkpoint-3", run / "checkpoint-3")
    kept = references(run / "checkpoint-3")
    assert kept.keys() == {"reference.train", "reference.eval"}
    assert kept["reference.train"].shape == (36,)
    assert (kept["reference.train"] < 0).all()
    arguments = [*inputs, "--save_steps", "3", "--output_dir", str(run)]
    assert main([*arguments, "--resume_from_checkpoint", "auto"]) == 0
    assert "pairs once" not in "".join(capsys.readouterr())
    name = "adapter_model.safetensors"
    ours, theirs = load_file(run / name), load_file(finished / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert record(run)["eval"] == record(finished)["eval"]
    drop = {"peak_bytes"}
    assert [{k: v for k, v in one.items() if k not in drop} for one in metrics(run)] == [
        {k: v for k, v in one.items() if k not in drop} for one in metrics(finished)[3:]
    ]


def test_the_reference_reads_the_pairs_of_the_steps(inputs, tmp_path, capsys):
    """More steps than before read the rest, to the bits of a run that was to take them all."""
    options = [*inputs, "--lr_scheduler_type", "constant", "--warmup_ratio", "0"]
    few, whole, name = tmp_path / "few", tmp_path / "whole", "adapter_model.safetensors"

    def steps(count, run, *more):
        given = ["--max_steps", str(count), "--save_steps", "2", "--output_dir", str(run), *more]
        assert main([*options, *given]) == 0
        read = re.search(r"reads (\d+) pairs once", "".join(capsys.readouterr()))
        assert read is not None
        return int(read[1])

    # Of each step two micro-batches of two pairs, beside the six that are held out.
    assert steps(2, few) == 2 * 4 + 6
    kept = references(few / "checkpoint-2")["reference.train"]
    assert (kept < 0).sum() == 2 * 2 * 4
    assert steps(4, few, "--resume_from_checkpoint", "auto", "--override", "max_steps") == 2 * 4
    assert steps(4, whole) == 4 * 4 + 6
    ours, theirs = load_file(few / name), load_file(whole / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (references(run / "checkpoint-4") for run in (few, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_that_goes_on_is_its_own_reference(inputs, finished, tmp_path):
    """Of all pairs: it is trained by the time that more steps are asked for."""
    run = tmp_path / "run"
    more = ["--adapter", str(finished), "--max_steps", "2", "--output_dir", str(run)]
    at = inputs.index("--lora_r")
    assert main([*inputs[:at], *inputs[at + 2 :], *more, "--save_steps", "2"]) == 0
    assert (references(run / "checkpoint-2")["reference.train"] < 0).all()
    found = record(run)["eval"]
    assert (found["margin_before"], found["accuracy_before"]) == (0, 0)
    assert found["margin_after"] > 0


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--method", "sft"], "give --method dpo"),
        (["--packing"], "whose pairs are rows of one batch"),
        (["--train_on_prompt"], "says nothing of what is preferred"),
        (["--format", "messages"], "which learns from pairs"),
        (["--method", "sft", "--beta", "0.2"], "without --method dpo"),
        (["--dpo_loss", "hinge"], "dpo_loss must be"),
        (["--columns", "chosen=text"], 'no field "chosen"'),
    ],
)
def test_what_goes_with_no_pairs_is_refused(inputs, tmp_path, capsys, more, problem):
    assert main([*inputs, "--output_dir", str(tmp_path / "run"), *more]) in (2, 3)
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_settings_of_pairs_are_another_run(inputs, finished, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(finished / "checkpoint-3", run / "checkpoint-3")
    arguments = [*inputs, "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    assert main([*arguments, "--beta", "0.3"]) == 2
    assert "beta: 0.1 there, 0.3 here" in capsys.readouterr().err


def test_pairs_are_no_rows_to_evaluate_on(finished, capsys):
    assert evaluate(["--adapter", str(finished), "--bits", "4"]) == 2
    assert "pairs" in capsys.readouterr().err


def test_show_data_shows_both_answers(inputs, capsys):
    assert show_data([*inputs[:4], "--rows", "3", "--token_cache", "none"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(chosen)") == shown.count("(rejected)") == 3
    assert "pairs," in shown
    assert "--packing" not in shown
    assert show_data([*inputs[:4], "--train_on_prompt", "--token_cache", "none"]) == 2
    assert "a prompt says nothing of what is preferred" in capsys.readouterr().err


def test_a_pair_is_planned_as_two_rows(inputs, capsys):
    base = [*inputs[:2], "--max_length", "64", "--bits", "16", "--dtype", "fp32", "--json"]

    def peak(*more):
        assert plan([*base, "--gradient_checkpointing", "none", *more]) == 0
        return json.loads(capsys.readouterr().out)["peak_bytes"]

    pair, two = peak("--batch_size", "1", "--method", "dpo"), peak("--batch_size", "2")
    assert pair == pytest.approx(two, rel=0.01)
    assert plan([*base, "--method", "dpo", "--packing"]) == 2
