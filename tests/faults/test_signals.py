"""Laws of a run that is asked to stop, and of two runs that want one directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from faults.harness import Fault, leftovers, result_of

from qlora_kit.training.checkpoint import newest
from qlora_kit.training.checkpoint_folder import numbered

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
ALL_CODES = CODES | {
    signal.SIGHUP: 129,
    signal.SIGQUIT: 131,
    signal.SIGUSR1: 138,
    signal.SIGUSR2: 140,
    signal.SIGXCPU: 152,
}


@pytest.mark.parametrize("number", list(ALL_CODES))
def test_a_signal_ends_the_step_saves_and_leaves(job, reference, output, number):
    running = job.having("--save_steps", "0").start(output, inject="slow_steps")
    running.wait_for("step 3 begins")
    running.signal(number)
    stopped = running.wait()
    assert stopped.code == ALL_CODES[number], stopped.output
    assert stopped.error.startswith(f"error: stopped by {number.name}: after step ")
    assert "--resume_from_checkpoint auto" in stopped.error
    found, notes = newest(output)
    assert found is not None
    assert found.step >= 2
    assert notes == []
    assert leftovers(output) == []
    if number not in CODES:
        return  # what is saved is the same
    resumed = job.having("--save_steps", "0").run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference
    # The signal's own checkpoint was for resuming; this run asked for none.
    assert numbered(output)[0] == {}


def test_a_step_that_does_not_end_is_dropped_and_replayed(job, reference, output):
    running = job.start(output, inject="endless_step")
    running.wait_for("step 3 goes on and on")
    running.signal(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code == 143, stopped.output
    assert "after step 2 of 5" in stopped.error
    found, _ = newest(output)
    assert found is not None
    assert found.step == 2
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference


@pytest.mark.parametrize("number", list(CODES))
def test_a_second_signal_leaves_the_step_at_once_and_saves(job, reference, output, number):
    running = job.start(output, inject="endless_step_endless_grace")
    running.wait_for("step 3 goes on and on")
    running.signal(number)
    time.sleep(0.3)
    running.signal(number)
    stopped = running.wait()
    assert stopped.code == CODES[number], stopped.output
    assert "after step 2 of 5, saved in " in stopped.error
    found, _ = newest(output)
    assert found is not None
    assert found.step == 2
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference
    assert leftovers(output) == []


def test_a_signal_in_a_save_lets_it_end(job, reference, output):
    stopped = job.run(output, inject="stop_in_save")
    assert stopped.code == 143, stopped.output
    assert leftovers(output) == []
    found, notes = newest(output)
    assert (found.step, notes) == (2, [])
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference


def test_a_second_signal_at_once_lets_a_save_end(job, reference, output):
    stopped = job.run(output, inject="stop_twice_in_save")
    assert stopped.code == 143, stopped.output
    found, notes = newest(output)
    assert (found.step, notes) == (2, [])
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference


def test_a_second_signal_in_a_save_leaves_the_checkpoint_before_it(job, reference, output):
    stopped = job.run(output, inject="stop_in_save_and_later_again")
    assert stopped.code == 143, stopped.output
    assert "second signal" in stopped.error
    found, notes = newest(output)
    assert (found.step, notes) == (1, [])
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference
    assert leftovers(output) == []


def test_a_signal_while_loading_leaves_nothing(job, output):
    stopped = job.run(output, inject="stop_in_load")
    assert stopped.code == 143
    assert stopped.error.startswith("error: stopped by SIGTERM")
    assert not output.exists()


def test_sigterm_ends_a_command_before_torch_is_there():
    """From the first moment: the handler is there before anything slow is imported."""
    code = (
        "import os, signal, sys\n"
        "from qlora_kit.commands.failure import reports_errors\n"
        "def main(argv):\n"
        "    assert 'torch' not in sys.modules\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return 0\n"
        "sys.exit(reports_errors(main)([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr.startswith("error: stopped by SIGTERM")


def test_a_second_run_is_told_who_holds_the_directory(job, reference, output):
    first = job.start(output, inject="endless_step")
    first.wait_for("step 3 goes on and on")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for extra in (("--overwrite",), ("--resume_from_checkpoint", "auto")):
        second = job.run(output, *extra)
        assert second.code == 4, second.output
        assert f"in use by process {first.pid};" in second.error
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    first.signal(signal.SIGKILL)
    first.wait()
    # A dead holder is taken over.
    assert (output / ".lock").read_text() == f"{first.pid}\n"
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference


def test_a_lock_file_of_a_process_that_lives_but_does_not_hold_it_is_taken_over(job, output):
    """Process ids come again: the kernel's lock counts, not the number."""
    killed = job.run(output, fault=Fault(60))
    assert killed.code == -signal.SIGKILL
    (output / ".lock").write_text(f"{os.getpid()}\n")
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert json.loads((output / "run.json").read_text())["train"]["steps"] == 5


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_lock_file_is_neither_waited_for_nor_written_to(job, output, tmp_path, kind):
    precious = tmp_path / "precious.txt"
    precious.write_text("1234567\n")
    output.mkdir()
    lock = output / ".lock"
    if kind == "link":
        lock.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    for extra in ((), ("--resume_from_checkpoint", "auto"), ("--overwrite",)):
        refused = job.run(output, *extra)
        assert refused.code in (2, 3), (extra, refused.output)
        assert precious.read_text() == "1234567\n"
        assert [path.name for path in output.iterdir()] == [".lock"]


def test_a_directory_that_is_removed_under_a_run_ends_it_with_an_error(job, output):
    running = job.start(output, inject="endless_step")
    running.wait_for("step 3 goes on and on")
    shutil.rmtree(output)
    running.signal(signal.SIGTERM)
    stopped = running.wait()
    assert stopped.code in (4, 143), stopped.output
    assert stopped.error.startswith("error: ")
    assert "unexpected" not in stopped.error
    assert not output.exists()


def test_interrupt_waits_for_the_micro_batch_and_not_for_the_step(job, output):
    """As ^C: it comes in the second of several micro-batches of the third step, the last then."""
    job = job.having("--batch_size", "1", "--gradient_accumulation_steps", "7")
    stopped = job.run(output, inject="interrupt_once")
    assert stopped.code == 130, stopped.output
    assert "stopping after this micro-batch\n" in stopped.output
    assert stopped.output.count("micro-batch of step 3\n") == 2
    assert "after step 2 of 5, saved in " in stopped.error
    found, _ = newest(output)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_is_ignored_stays_ignored(job, reference, output, number):
    """As nohup ignores SIGHUP, and a shell SIGINT of what it puts into the background."""
    done = job.run(output, inject=f"ignored {number.name}")
    assert done.code == 0, done.output
    assert result_of(output) == reference


def test_the_kernel_repeating_that_time_is_up_does_not_break_a_save(job, output):
    stopped = job.run(output, inject="time_is_up_in_save")
    assert stopped.code == 152, stopped.output
    found, notes = newest(output)
    assert (found.step, notes) == (2, [])


def test_a_signal_while_something_is_imported_waits_for_the_import(tmp_path):
    """An exception in the middle of torch's import ends in SIGABRT."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n"
        "    time.sleep(0.3)\n"
        "except BaseException:\n"
        "    os.abort()\n"
        "print('imported', flush=True)\n"
    )
    code = (
        "import sys\n"
        "from qlora_kit.commands.failure import reports_errors\n"
        "def main(argv):\n"
        "    import slow, time\n"
        "    time.sleep(60)\n"
        "    print('not stopped')\n"
        "    return 0\n"
        "sys.exit(reports_errors(main)([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert (done.returncode, done.stdout) == (143, "imported\n")
    assert done.stderr.startswith("error: stopped by SIGTERM")


def test_stopped_in_the_last_evaluation_the_last_adapter_is_saved_and_not_the_best(job, tmp_path):
    """So that a run that goes on from there is the run that never stopped."""
    kept, stopped = tmp_path / "kept", tmp_path / "stopped"
    # Before the first step, after steps 3 and 5 (the worse one at such a rate), and of the best.
    job = job.having(
        "--eval_steps", "3", "--learning_rate", "30", "--lr_scheduler_type", "constant"
    )
    assert job.run(kept, "--load_best").code == 0
    outcome = job.having("--save_steps", "0").run(
        stopped, "--load_best", inject="signal_in last-evaluation SIGTERM"
    )
    assert outcome.code == 143, outcome.output
    assert "taking the adapter of step 3" in outcome.output
    name = "checkpoint-5/training.safetensors"
    assert (stopped / name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.parametrize("phase", ["first-evaluation", "last-evaluation", "writing"])
def test_the_ssh_that_goes_in_any_phase_costs_nothing(job, reference, output, phase):
    """A sample; benchmarks/signals.py has every signal in every phase."""
    outcome = job.run(output, inject=f"signal_in {phase} SIGHUP")
    # The result that is being written is finished; before the first step there is nothing to keep.
    assert outcome.code == (0 if phase == "writing" else 129), outcome.output
    assert (output / "run.json").exists() == (phase == "writing")
    assert output.exists() == (phase != "first-evaluation")
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(output) == reference
    assert leftovers(output) == []
