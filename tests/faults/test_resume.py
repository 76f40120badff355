"""Laws of resuming: bit for bit as if the run had never stopped."""

from __future__ import annotations

import json
import math

import pytest
from faults.harness import SETTINGS, STEPS, Fault, leftovers, result_of

from qlora_kit.config.training import OPTIMIZERS
from qlora_kit.run.result import Progress
from qlora_kit.training.checkpoint import load_checkpoint

ALL = ("--save_total_limit", "99")


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").open()]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resuming_is_exact_for_every_optimizer(job, output, optim):
    """From inside of the first epoch (of 4 steps), and from its end; with dropout.

    From every step for one of them: what is drawn by then is the same for all.

    At rank 64 a matrix has 4,096 elements, from which on states are in 8 bits. `auto` goes on with
    the optimizer of the checkpoint.
    """
    this = job.having("--optim", optim, "--lora_r", "64", *ALL)
    assert this.run(output).code == 0
    whole = load_checkpoint(output / f"checkpoint-{STEPS}")
    kept = {str(tensor.dtype) for tensor in whole.tensors.values()}
    assert ("torch.uint8" in kept) == ("8bit" in optim)
    for step in range(1, STEPS) if optim == "adamw_8bit" else (1, STEPS - 1):
        again = output.with_name(f"from-{step}")
        path = str(output / f"checkpoint-{step}")
        asked = ("--optim", "auto") if step == 1 else ()
        resumed = this.run(again, "--resume_from_checkpoint", path, *asked)
        assert resumed.code == 0, resumed.output
        assert result_of(again) == result_of(output), step
        assert losses(again) == losses(output)[step:]
        last = f"checkpoint-{STEPS}/training.safetensors"
        assert (again / last).read_bytes() == (output / last).read_bytes(), step
        ours, theirs = (json.loads((d / "run.json").read_text()) for d in (again, output))
        assert ours["model"]["trainable_parameters"] == theirs["model"]["trainable_parameters"]
        for part in ("steps", "tokens", "first_loss", "last_loss"):
            assert ours["train"][part] == theirs["train"][part]
        assert ours["eval"] == theirs["eval"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bits", "4"),
        ("--bits", "8", "--dtype", "bf16"),
        ("--dtype", "bf16", "--gradient_checkpointing", "full"),
        ("--gradient_accumulation_steps", "2", "--eval_steps", "0", "--eval_fraction", "0.3"),
        ("--lr_scheduler_type", "linear", "--warmup_steps", "3", "--weight_decay", "0.1"),
        ("--gradient_accumulation_steps", "2", "--eval_steps", "0", "--eval_fraction", "0"),
        ("--packing", "--batch_size", "1"),
        ("--group_by_length",),
    ],
)
def test_resuming_is_exact_whatever_the_run_is(job, output, arguments):
    if "--eval_fraction" in arguments:
        arguments = (*arguments, "--data", str(job.directory / "data" / "train.jsonl"))
    this = job.having(*arguments, *ALL)
    assert this.run(output).code == 0
    again = output.with_name("again")
    resumed = this.run(again, "--resume_from_checkpoint", str(output / "checkpoint-3"))
    assert resumed.code == 0, resumed.output
    assert result_of(again) == result_of(output)


def test_evaluation_changes_nothing(job, reference, output):
    without = job.having("--eval_steps", "0", "--save_steps", "0")
    assert without.run(output).code == 0
    assert result_of(output) == reference


def test_a_run_that_was_killed_between_its_last_step_and_its_result(job, reference, output):
    killed = job.run(output, fault=Fault(1, path=".result."))
    assert killed.code == -9
    assert not (output / "run.json").exists()
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference
    assert leftovers(output) == []
    assert len(losses(output)) == STEPS


def test_the_best_adapter_is_saved_and_survives_a_kill(job, output):
    """A rate so high that the held-out loss is lowest after the first step of three."""
    rising = job.having("--learning_rate", "3", "--lr_scheduler_type", "constant")
    rising = rising.having("--warmup_steps", "0", "--eval_steps", "1", "--max_steps", "3", *ALL)
    assert rising.run(output.with_name("last")).code == 0
    best = rising.having("--load_best")
    outcome = best.run(output)
    assert outcome.code == 0, outcome.output
    run = json.loads((output / "run.json").read_text())
    history = {entry["step"]: entry["loss"] for entry in run["eval"]["history"]}
    step = min(history, key=history.get)
    assert sorted(history) == [1, 2, 3]
    assert step < 3, history  # or the test shows nothing
    assert run["train"]["best_step"] == step
    assert run["eval"]["loss_after"] == history[step]
    assert result_of(output) != result_of(output.with_name("last"))
    assert (output / "adapter_model.safetensors").read_bytes() == (
        output / f"checkpoint-{step}" / "adapter_model.safetensors"
    ).read_bytes()
    killed_at = output.with_name("killed")
    # One checkpoint is kept: that of the best step is gone when the run is killed.
    killed = best.having("--save_total_limit", "1")
    assert killed.run(killed_at, fault=Fault(1, path=".result.")).code == -9
    resumed = killed.run(killed_at, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(killed_at) == result_of(output)


def test_the_last_adapter_may_be_the_best_wherever_the_last_step_stands(job, output):
    falling = job.having("--eval_steps", "2", "--max_steps", "3", "--save_steps", "0", *ALL)
    assert falling.run(output, "--load_best").code == 0
    run = json.loads((output / "run.json").read_text())
    history = {entry["step"]: entry["loss"] for entry in run["eval"]["history"]}
    assert sorted(history) == [2, 3]
    assert history[3] < history[2], history  # or the test shows nothing
    assert run["train"]["best_step"] == 3
    assert run["eval"]["loss_after"] == history[3]


def test_taking_the_best_adapter_is_not_begun_or_given_up_on_the_way(job, output):
    """The checkpoint of a run without it has no best adapter, and the last is not the best."""
    for first, second in (((), ("--load_best",)), (("--load_best",), ())):
        place = output.with_name("-".join(("run", *first)))
        killed = job.having(*first).run(place, fault=Fault(1, path=".checkpoint-4."))
        assert killed.code == -9
        refused = job.having(*second).run(place, "--resume_from_checkpoint", "auto")
        assert refused.code == 2, refused.output
        assert "load_best" in refused.error
        assert not (place / "run.json").exists()


def test_a_checkpoint_from_elsewhere_does_not_replace_another_run(job, output):
    other = output.with_name("other")
    for place in (output, other):
        assert job.run(place, fault=Fault(1, path=".checkpoint-4.")).code == -9
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    path = str(output / "checkpoint-2")
    refused = job.run(other, "--resume_from_checkpoint", path)
    assert refused.code == 2, refused.output
    assert "checkpoints of its own" in refused.error
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_is_never_the_best():
    progress = Progress(history=((1, math.nan), (2, 3.0), (3, 2.0), (4, math.inf)))
    assert progress.best == (3, 2.0)
    assert Progress(history=((1, math.nan),)).best is None


def test_a_run_that_gets_no_better_stops_early(job, output):
    rising = job.having("--learning_rate", "3", "--lr_scheduler_type", "constant")
    rising = rising.having("--warmup_steps", "0", "--eval_steps", "1", "--max_steps", "30")
    rising = rising.having("--early_stopping", "2", "--save_steps", "0")
    outcome = rising.run(output)
    assert outcome.code == 0, outcome.output
    run = json.loads((output / "run.json").read_text())
    history = [entry["loss"] for entry in run["eval"]["history"]]
    best = history.index(min(history))
    assert run["train"]["steps"] == len(history) == best + 3 < 30
    assert "no lower held-out loss in 2 evaluations" in outcome.output


def test_the_default_directory_is_the_latest_of_its_name(job, tmp_path):
    """Without --output_dir: runs/<model>-<data>-<bits>bit, then -2, -3; `auto` takes the latest."""
    command = [*job.inputs, *SETTINGS]
    first = job.run_command(command, cwd=tmp_path)
    assert first.code == 0, first.output
    assert (tmp_path / "runs" / "base-data-16bit" / "run.json").exists()
    killed = job.run_command(command, cwd=tmp_path, fault=Fault(1, path=".checkpoint-4."))
    assert killed.code == -9
    second = tmp_path / "runs" / "base-data-16bit-2"
    assert not (second / "run.json").exists()
    resumed = job.run_command([*command, "--resume_from_checkpoint", "auto"], cwd=tmp_path)
    assert resumed.code == 0, resumed.output
    assert "going on from" in resumed.output
    assert result_of(second) == result_of(tmp_path / "runs" / "base-data-16bit")
    assert job.run_command(command, cwd=tmp_path).code == 0
    assert (tmp_path / "runs" / "base-data-16bit-3" / "run.json").exists()


def test_a_finished_runs_config_runs_again(job, output):
    """config.yaml is accepted, and says nothing of how the process began."""
    assert job.run(output, "--resume_from_checkpoint", "auto").code == 0
    text = (output / "config.yaml").read_text()
    assert "resume_from_checkpoint" not in text
    again = output.with_name("again")
    done = job.run_command(["--config", str(output / "config.yaml"), "--output_dir", str(again)])
    assert done.code == 0, done.output
    assert result_of(again) == result_of(output)
