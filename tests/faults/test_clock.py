"""Laws of checkpoints by the clock, of what a finished run keeps, and of going on from one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from faults.harness import leftovers, result_of

from qlora_kit.training.checkpoint_folder import numbered

OFTEN = ("--save_minutes", "1e-9")
"""So short that it is over after every step."""


def files_of(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def planned(job, tmp_path_factory):
    """Nothing by the clock, a checkpoint of every second step, and the files of such a run."""
    output = tmp_path_factory.mktemp("planned") / "run"
    assert job.run(output, "--save_steps", "2", "--save_minutes", "0").code == 0
    assert set(numbered(output)[0]) == {2, 4}
    return files_of(output)


def test_the_clock_changes_no_number_and_leaves_nothing(job, reference, planned, output):
    done = job.run(output, "--save_steps", "2", *OFTEN)
    assert done.code == 0, done.output
    assert result_of(output) == reference
    assert files_of(output) == planned


def test_killed_a_run_without_save_steps_goes_on_from_the_last_step(job, reference, output):
    job = job.having("--save_steps", "0", *OFTEN)
    running = job.start(output, inject="endless_step")
    running.wait_for("step 3 goes on and on")
    running.signal(signal.SIGKILL)
    running.wait()
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert "going on from" in resumed.output
    assert "checkpoint-2" in resumed.output
    assert result_of(output) == reference
    assert numbered(output)[0] == {}


def test_by_the_clock_is_off_with_zero_and_ten_minutes_by_default(job, output):
    for extra in (("--save_minutes", "0"), ()):
        running = job.having("--save_steps", "0", *extra).start(output, inject="endless_step")
        running.wait_for("step 3 goes on and on")
        running.signal(signal.SIGKILL)
        running.wait()
        assert numbered(output)[0] == {}
        assert job.run(output, "--resume_from_checkpoint", "auto", *extra).code == 0
        config = (output / "config.yaml").read_text()
        assert f"save_minutes: {extra[1] + '.0' if extra else '10.0'}\n" in config
        output = output.with_name("other")


@pytest.mark.parametrize("often", [(), OFTEN])
def test_a_run_that_was_stopped_again_and_again_keeps_the_files_of_one_that_was_not(
    job, reference, planned, output, often
):
    """Stopped in each step in turn: planned checkpoints alone stay."""
    job = job.having("--save_steps", "2", *often)
    stopped = job.run(output, inject="stop_in_next_step")
    for _ in range(5):
        assert stopped.code == 143, stopped.output
        again = ("--resume_from_checkpoint", "auto")
        stopped = job.run(output, *again, inject="stop_in_next_step")
    assert stopped.code == 0, stopped.output
    assert result_of(output) == reference
    assert files_of(output) == planned


def test_killed_between_the_result_and_the_last_tidying_a_run_is_tidied(job, reference, output):
    """Its checkpoints by the clock go when it is asked for again."""
    job = job.having("--save_steps", "0", *OFTEN)
    killed = job.run(output, inject="killed_before_tidying")
    assert killed.code == -signal.SIGKILL, killed.output
    assert (output / "run.json").exists()
    assert numbered(output)[0]
    again = job.run(output, "--resume_from_checkpoint", "auto")
    assert again.code == 0, again.output
    assert "finished; nothing was changed" in again.output
    assert result_of(output) == reference
    assert (numbered(output)[0], leftovers(output)) == ({}, [])


def test_a_full_disk_at_a_checkpoint_by_the_clock_is_a_note(job, reference, output):
    job = job.having("--save_steps", "0", *OFTEN)
    done = job.run(output, inject="full_disk_at_checkpoint_2")
    assert done.code == 0, done.output
    assert "note: no checkpoint was written: " in done.output
    assert result_of(output) == reference


def test_a_finished_run_goes_on_from_its_last_checkpoint(job, output):
    longer = ("--max_steps", "7", "--save_steps", "2")
    assert job.run(output, "--save_steps", "2").code == 0
    before = files_of(output)
    auto = ("--resume_from_checkpoint", "auto")
    refused = job.run(output, *longer, *auto)
    assert refused.code == 2, refused.output
    assert "max_steps: 5 there, 7 here; give the same, or --override max_steps" in refused.error
    assert files_of(output) == before
    done = job.run(output, *longer, *auto, "--override", "max_steps")
    assert done.code == 0, done.output
    assert "going on from" in done.output
    assert json.loads((output / "run.json").read_text())["train"]["steps"] == 7
    assert set(numbered(output)[0]) == {4, 6}
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    # Asked for what it has, it is finished.
    again = job.run(output, *longer, *auto)
    assert (again.code, "finished; nothing was changed" in again.output) == (0, True)


def test_a_finished_run_is_compared_as_one_that_goes_on(job, output, tmp_path):
    """What contradicts it is refused with the same words, and nothing is changed."""
    job = job.having("--save_steps", "0")
    assert job.run(output).code == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    data = tmp_path / "data"
    shutil.copytree(job.directory / "data", data)
    auto = ("--resume_from_checkpoint", "auto")
    same = job.run(output, "--data", str(data), *auto)  # the same rows elsewhere
    assert (same.code, "finished; nothing was changed" in same.output) == (0, True)
    for rows in (data / "train.jsonl", data / "valid.jsonl"):
        rows.write_text(rows.read_text().replace("w3", "w4"))
    cases = [
        (("--data", str(data)), "data: other contents; eval_data: other contents"),
        (("--lora_r", "8"), "lora_r: 4 there, 8 here"),
        (("--max_steps", "3"), "max_steps: 5 there, 3 here"),
        (("--learning_rate", "0.5"), "learning_rate: 0.01 there, 0.5 here"),
    ]
    for other, how in cases:
        refused = job.run(output, *other, *auto)
        assert refused.code == 2, refused.output
        assert f"{output} is of a run that differs from this one: {how}; it is" in refused.error
    named = job.run(output, *other, *auto, "--override", "learning_rate")
    assert (named.code, "finished; nothing was changed" in named.output) == (0, True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    # A run of an older version does not say which rows it had, and is compared without them.
    record = json.loads((output / "run.json").read_text())
    for name in ("fingerprint", "eval_fingerprint"):
        del record["data"][name]
    (output / "run.json").write_text(json.dumps(record))
    assert job.run(output, "--data", str(data), *auto).code == 0
    assert job.run(output, *other, *auto).code == 2


def test_a_finished_run_without_a_checkpoint_says_which_command_goes_on(job, tmp_path):
    output, more = tmp_path / "run", tmp_path / "more"
    short = job.having("--save_steps", "0")
    assert short.run(output).code == 0
    auto = ("--resume_from_checkpoint", "auto")
    refused = short.run(output, "--max_steps", "7", *auto)
    assert refused.code == 2, refused.output
    assert f"--adapter {output} and another --output_dir" in refused.error
    done = short.run(more, "--max_steps", "7", "--adapter", str(output))
    assert done.code == 0, done.output


def test_two_runs_that_take_one_default_name_at_once_get_two(job, tmp_path):
    command = [*job.command(tmp_path)[:-2], "--seed", "1"]
    first = job.start_command(command, cwd=tmp_path, inject="endless_step")
    first.wait_for("step 3 goes on and on")
    # The second one looks for a name before the first one is there, and comes to it after.
    second = job.run_command(command, cwd=tmp_path, inject="name_looked_for_too_early")
    first.signal(signal.SIGTERM)
    assert first.wait().code == 143
    assert second.code == 0, second.output
    one, two = sorted((tmp_path / "runs").iterdir())
    assert two.name == f"{one.name}-2"
    assert (two / "run.json").exists()
    assert f"output_dir: runs/{two.name}\n" in (two / "config.yaml").read_text()
    assert set(numbered(one)[0]) == {1, 2}
