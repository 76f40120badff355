"""Laws of steps that are not finite, and of a device that is full."""

from __future__ import annotations

import json

import pytest
import torch
from faults.harness import leftovers
from safetensors.torch import load_file

from qlora_kit.training.checkpoint import load_checkpoint, newest

TWO_AT_ONCE = ("--save_total_limit", "9")


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


@pytest.mark.parametrize("inject", ["nan_loss_at_2", "nan_gradient_at_2"])
def test_a_step_that_is_not_finite_changes_nothing(job, output, inject):
    outcome = job.having(*TWO_AT_ONCE).run(output, inject=inject)
    assert outcome.code == 0, outcome.output
    before, after, later = (load_checkpoint(output / f"checkpoint-{n}") for n in (1, 2, 3))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(after.tensors[name], t) for name, t in before.tensors.items())
    assert before.state["optimizer"] == after.state["optimizer"]
    assert any(not torch.equal(later.tensors[name], t) for name, t in before.tensors.items())
    assert (after.state["guard"]["bad_in_a_row"], later.state["guard"]["bad_in_a_row"]) == (1, 0)
    line = next(line for line in outcome.output.splitlines() if "skipped" in line)
    where = (
        "model.layers.1.self_attn.o_proj"
        if inject == "nan_loss_at_2"
        else "the gradient of model.layers.1.self_attn.v_proj.lora_B.default.weight"
    )
    assert "step 2: loss" in line
    assert f"first not finite in {where}" in line
    assert "rows " in line
    run = json.loads((output / "run.json").read_text())
    assert run["train"]["skipped_steps"] == 1
    assert [line["loss"] is None or line["grad_norm"] is None for line in metrics(output)] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_three_in_a_row_stop_the_run_with_the_last_good_state(job, output):
    outcome = job.having("--save_steps", "0").run(output, inject="nan_loss_from_3")
    assert outcome.code == 5, outcome.output
    assert "step 5: loss nan" in outcome.error
    assert "3 such steps in a row" in outcome.error
    assert "rows " in outcome.error
    found, notes = newest(output)
    assert notes == []
    assert found.step == 4
    assert leftovers(output) == []
    # Two of its steps were skipped: the state is that after step 2.
    clean = job.having("--save_steps", "2", "--save_total_limit", "9")
    assert clean.run(output.with_name("clean")).code == 0
    good = load_checkpoint(output.with_name("clean") / "checkpoint-2")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in good.tensors.items())


def test_a_run_of_bad_steps_alone_leaves_nothing(job, output):
    outcome = job.run(output, inject="nan_loss_from_1")
    assert outcome.code == 5, outcome.output
    assert not output.exists()


def test_a_resumed_run_counts_bad_steps_on(job, output):
    """Killed after a skipped step, then going on: the third bad one in a row still stops it."""
    from faults.harness import Fault

    killed = job.run(output, inject="nan_loss_from_3", fault=Fault(1, path=".checkpoint-4."))
    assert killed.code == -9, killed.output
    assert newest(output)[0].step == 3
    resumed = job.run(output, "--resume_from_checkpoint", "auto", inject="nan_loss_from_3")
    assert resumed.code == 5, resumed.output
    assert "step 5" in resumed.error


def test_a_full_device_gets_smaller_micro_batches_and_the_same_step(job, output):
    same = ("--lora_dropout", "0")
    outcome = job.having(*same).run(output, inject="full_device_above_one_row")
    assert outcome.code == 0, outcome.output
    line = [line for line in outcome.output.splitlines() if "out of memory with 2 rows" in line]
    assert len(line) == 1
    assert "2 rows at a time: going on with 1 and twice the accumulation" in line[0]
    run = json.loads((output / "run.json").read_text())
    assert run["train"]["micro_batch_rows"] == 1
    assert job.having(*same).run(output.with_name("whole")).code == 0
    # fp32 sums in another order; the largest loss is 6.
    for ours, whole in zip(metrics(output), metrics(output.with_name("whole")), strict=True):
        assert ours["loss"] == pytest.approx(whole["loss"], rel=2e-6)
        assert ours["supervised_tokens"] == whole["supervised_tokens"]


def test_one_row_that_does_not_fit_is_an_error_with_three_ways_out(job, output):
    outcome = job.run(output, inject="full_device")
    assert outcome.code == 4, outcome.output
    for part in ("one row of 32 tokens", "bytes free", "--max_length", "full", "--bits 4"):
        assert part in outcome.error, part
    assert "36028797018963968 bytes more needed" in outcome.error
    found, notes = newest(output)
    assert (found.step, notes) == (2, [])
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output


def test_a_step_that_the_optimizer_took_half_of_is_not_saved(job, reference, output):
    """The run goes on from the checkpoint before, to the same bytes."""
    settings = job.having("--save_steps", "2", "--save_total_limit", "9")
    failed = settings.run(output, inject="full_device_in_optimizer")
    assert failed.code == 4, failed.output
    whole = "step 4 is not saved, for the optimizer may have taken half of it"
    for part in (whole, "checkpoint-2 is whole", "--resume_from_checkpoint", "--optim adamw_8bit"):
        assert part in failed.error, part
    found, notes = newest(output)
    assert (found.step, notes, leftovers(output)) == (2, [], [])
    resumed = settings.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert {name: (output / name).read_bytes() for name in reference} == reference


def test_a_step_that_fails_half_taken_is_not_saved_whatever_it_failed_with(job, output):
    settings = job.having("--save_steps", "2", "--save_total_limit", "9")
    failed = settings.run(output, inject="bug_in_optimizer")
    assert failed.code not in (0, 4), failed.output
    assert newest(output)[0].step == 2


def check_step_is_saved(job, failed, output, step, reference):
    """A run that a full device ended stands at that step, and resumes to the reference's bytes."""
    assert failed.code == 4, failed.output
    assert newest(output)[0].step == step
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert {name: (output / name).read_bytes() for name in reference} == reference


def test_a_device_that_is_full_after_the_passes_loses_no_step(job, reference, output):
    """What the optimizer has not begun with is the state after the step before."""
    settings = job.having("--save_steps", "0")
    failed = settings.run(output, inject="full_device_after_the_passes")
    assert "out of memory" in failed.error
    check_step_is_saved(settings, failed, output, 3, reference)


def test_states_that_do_not_fit_are_refused_before_the_first_step(job, output):
    outcome = job.run(output, inject="full_device_for_states")
    assert outcome.code == 4, outcome.output
    for part in ("states of the optimizer", "bytes planned", "--optim adamw_8bit", "--lora_r"):
        assert part in outcome.error, part
    assert not output.exists()


def test_a_host_without_memory_gets_smaller_micro_batches(job, tmp_path):
    """The real thing: an address space with room for the process, but not for the batch."""
    line = json.dumps({"text": " ".join(f"w{3 + j % 80}" for j in range(126))}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 260)
    big = job.having("--batch_size", "256", "--max_length", "128", "--eval_steps", "0")
    big = big.having("--data", str(tmp_path / "rows.jsonl"), "--eval_fraction", "0")
    outcome = big.run(tmp_path / "run", "--max_steps", "1", inject="tight_memory")
    assert outcome.code == 0, outcome.output
    assert "out of memory with 256 rows at a time: going on with 128" in outcome.output


def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path):
    from families import save_checkpoint as save_base

    from qlora_kit.base.load import load_base
    from qlora_kit.errors import NumericError
    from qlora_kit.lora.adapter import save_adapter
    from qlora_kit.lora.inject import inject_lora
    from qlora_kit.training.checkpoint import save_checkpoint

    save_base(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), bits=16, dtype="fp32")
    model = inject_lora(base.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    list(trained.values())[3].data.view(-1)[5] = float("inf")
    (tmp_path / "run").mkdir()
    tensors = {f"master.{name}": p.detach() for name, p in trained.items()}
    with pytest.raises(NumericError, match="not finite"):
        save_checkpoint(tmp_path / "run", 1, tensors, {}, lambda directory: None)
    with pytest.raises(NumericError, match="not finite"):
        save_adapter(base, tmp_path / "run" / "adapter")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_whose_adapter_is_not_finite_keeps_the_checkpoint_before(job, output):
    """Through the command: one value flips between two steps."""
    outcome = job.run(output, inject="adapter_value_flips_at_3")
    assert outcome.code == 5, outcome.output
    assert "lora_A" in outcome.error
    found, notes = newest(output)
    assert (found.step, notes) == (2, [])
    assert leftovers(output) == []
    assert not (output / "adapter_model.safetensors").exists()


def test_an_adapter_that_is_not_finite_is_no_result(job, output):
    """Without checkpoints there is nothing to keep."""
    settings = ("--save_steps", "0", "--max_steps", "4", "--eval_steps", "0")
    outcome = job.having(*settings).run(output, inject="adapter_value_flips_at_3")
    assert outcome.code == 5, outcome.output
    assert not output.exists()


def test_held_out_rows_that_do_not_fit_are_evaluated_in_smaller_batches(job, output):
    outcome = job.run(output, inject="full_device_in_evaluation_above_one_row")
    assert outcome.code == 0, outcome.output
    said = [line for line in outcome.output.splitlines() if "out of memory" in line]
    assert [line[line.index("going on") :] for line in said] == [
        "going on with 4",
        "going on with 2",
        "going on with 1",
    ]
    assert job.run(output.with_name("whole")).code == 0
    ours, whole = (
        json.loads((o / "run.json").read_text()) for o in (output, output.parent / "whole")
    )
    for key in ("loss_before", "loss_after"):
        assert ours["eval"][key] == pytest.approx(whole["eval"][key], rel=2e-6)


def test_a_last_evaluation_that_does_not_fit_loses_no_step(job, reference, output):
    """By default nothing is saved before the end: hours of training wait for this evaluation."""
    settings = job.having("--save_steps", "0", "--eval_steps", "0")
    failed = settings.run(output, inject="full_device_in_the_last_evaluation")
    assert "one held-out row" in failed.error
    check_step_is_saved(settings, failed, output, 5, reference)


def test_small_steps_move_every_entry(job, output):
    """bf16 adapters with fp32 masters at a rate that pure bf16 would round away."""
    moving = job.having("--dtype", "bf16", "--learning_rate", "1e-5", "--max_steps", "20")
    moving = moving.having("--lr_scheduler_type", "constant", "--save_steps", "10", "--eval_steps")
    outcome = moving.having("0", "--warmup_steps", "0", "--save_total_limit", "99").run(output)
    assert outcome.code == 0, outcome.output
    first = load_file(output / "checkpoint-10" / "training.safetensors")
    last = load_file(output / "checkpoint-20" / "training.safetensors")
    names = [name for name in first if name.startswith("master.") and "lora_A" in name]
    still = sum(int((first[name] == last[name]).sum()) for name in names)
    assert still < 0.01 * sum(first[name].numel() for name in names)
