"""Laws of a run that is killed: it can be resumed, and ends in the same bytes."""

from __future__ import annotations

import random
import signal
import time

import pytest
from faults.harness import WRITES, Fault, leftovers, result_of

from qlora_kit.training.checkpoint import newest


@pytest.fixture(scope="module")
def counted(job, tmp_path_factory):
    """The calls of a run that nothing happens to, and the seconds that it took."""
    began = time.monotonic()
    outcome = job.run(tmp_path_factory.mktemp("counted") / "run")
    assert outcome.code == 0, outcome.output
    assert len(outcome.calls) > 100
    return outcome.calls, time.monotonic() - began


def test_killed_at_any_call_a_run_resumes_to_the_same_bytes(job, reference, counted, tmp_path):
    """A sample of the points; benchmarks/kills.py goes through all of them.

    After a call the disk is as before the next one, and inside is another place in writes alone.
    """
    calls, draw = counted[0], random.Random(11)
    writes = [at for at, name in enumerate(calls, start=1) if name in WRITES]
    for how, points in (("before", range(1, len(calls))), ("inside", writes)):
        for at in sorted(draw.sample(points, 3)):
            output = tmp_path / f"{how}-{at}"
            killed = job.run(output, fault=Fault(at, how))
            assert killed.code == -signal.SIGKILL, (how, at, killed.output)
            resumed = job.run(output, "--resume_from_checkpoint", "auto")
            assert resumed.code == 0, (how, at, resumed.output)
            assert result_of(output) == reference, (how, at)
            assert leftovers(output) == [], (how, at)


def test_killed_in_its_first_moments_a_run_resumes(job, reference, counted, tmp_path):
    """Also where the lock file is all there is, and still says nothing."""
    first = next(at for at, name in enumerate(counted[0], start=1) if name in WRITES)
    for how, points in (("before", range(1, 7)), ("inside", [first])):
        for at in points:
            output = tmp_path / f"{how}-{at}"
            assert job.run(output, fault=Fault(at, how)).code == -signal.SIGKILL
            resumed = job.run(output, "--resume_from_checkpoint", "auto")
            assert resumed.code == 0, (how, at, resumed.output)
            assert result_of(output) == reference, (how, at)


def test_killed_at_random_times_a_run_resumes_to_the_same_bytes(job, reference, counted, tmp_path):
    duration, draw = counted[1], random.Random(12)
    for number in range(2):
        output = tmp_path / f"{number}"
        running = job.start(output)
        time.sleep(draw.random() * duration)
        running.signal(signal.SIGKILL)
        running.wait()
        resumed = job.run(output, "--resume_from_checkpoint", "auto")
        assert resumed.code == 0, resumed.output
        assert result_of(output) == reference
        assert leftovers(output) == []


def test_a_run_without_a_checkpoint_starts_from_the_start_and_says_so(job, reference, output):
    killed = job.run(output, fault=Fault(6))
    assert killed.code == -signal.SIGKILL
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0
    assert "no checkpoint: starting from the start" in resumed.output
    assert result_of(output) == reference


def test_a_failed_call_leaves_what_was_there_and_nothing_half_done(
    job, reference, counted, tmp_path
):
    """As a full disk or a broken one fails it; a sample of the points."""
    calls, draw = counted[0], random.Random(13)
    for at in sorted(draw.sample(range(1, len(calls)), 4)):
        output = tmp_path / f"{at}"
        failed = job.run(output, fault=Fault(at, "fail"))
        if failed.code == 0:  # a second try had room
            assert result_of(output) == reference
            continue
        assert failed.code == 4, (at, failed.output)
        assert failed.error.startswith("error: "), (at, failed.output)
        if not output.exists():
            continue
        assert leftovers(output) == [], at
        found, notes = newest(output)
        assert found is not None, (at, notes)
        assert not notes
        resumed = job.run(output, "--resume_from_checkpoint", "auto")
        assert resumed.code == 0, (at, resumed.output)
        assert result_of(output) == reference


def test_what_overwrite_replaces_is_there_until_there_is_something_better(job, output):
    def content():
        return {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file()}

    output.mkdir()
    (output / "wandb").mkdir()
    (output / "wandb" / "precious.txt").write_text("old")
    (output / "run.json").write_text('{"config": {}, "versions": {}, "train": {}}')
    before = content()
    failed = job.run(output, "--overwrite", inject="nan_loss_from_1")
    assert failed.code == 5, failed.output
    assert content() == before
    stopped = job.run(output, "--overwrite", inject="stop_in_load")
    assert stopped.code == 143
    assert content() == before
    for at in (1, 2, 4, 6, 16):
        killed = job.run(output, "--overwrite", fault=Fault(at, path=str(output)))
        assert killed.code == -signal.SIGKILL
        # The next run that fails puts it back.
        failed = job.run(output, "--overwrite", inject="nan_loss_from_1")
        assert failed.code == 5, failed.output
        assert content() == before, at
    done = job.run(output, "--overwrite")
    assert done.code == 0
    assert not (output / "wandb").exists()
    assert leftovers(output) == []


def test_a_call_that_fails_while_it_replaces_puts_everything_back(job, output):
    """Each call in turn: the lock, the folder aside, each move; the first finds its folder made."""
    output.mkdir()
    for name in ("config.json", "merges.txt", "export.json"):
        (output / name).write_text('{"merge_base": "original", "dtype": "bf16"}')
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for at in range(2, 8):
        failed = job.run(output, "--overwrite", fault=Fault(at, "fail", path=str(output)))
        assert failed.code == 4, (at, failed.output)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before, at


def test_killed_while_it_replaces_a_run_resumes_and_replaces(job, reference, tmp_path):
    refused = []
    for at in (1, 2, 4, 6, 30):
        output = tmp_path / f"{at}"
        output.mkdir()
        (output / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
        killed = job.run(output, "--overwrite", fault=Fault(at, path=str(output)))
        assert killed.code == -signal.SIGKILL
        resumed = job.run(output, "--resume_from_checkpoint", "auto")
        if resumed.code == 2:  # before anything was moved: it is still another's directory
            assert "merge_base" in (output / "export.json").read_text()
            refused.append(at)
            continue
        assert resumed.code == 0, (at, resumed.output)
        assert result_of(output) == reference
        assert not (output / "export.json").exists()

    assert 0 < len(refused) < 4


def test_a_run_that_was_killed_after_its_last_word_is_finished_and_tidied(job, reference, output):
    """The second call on its lock takes it away."""
    killed = job.run(output, fault=Fault(2, path=".lock"))
    assert killed.code == -signal.SIGKILL
    assert leftovers(output) == [".lock"]
    again = job.run(output, "--resume_from_checkpoint", "auto")
    assert again.code == 0, again.output
    assert "finished; nothing was changed" in again.output
    assert result_of(output) == reference
    assert leftovers(output) == []


@pytest.mark.parametrize("extra", [(), ("--resume_from_checkpoint", "auto")])
def test_a_finished_run_says_so_and_changes_nothing(job, output, extra):
    assert job.run(output).code == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("*") if p.is_file()}
    again = job.run(output, *extra)
    if extra:
        assert again.code == 0
        assert "finished; nothing was changed" in again.output
    else:
        assert again.code == 2
        assert "is not empty" in again.error
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("*") if p.is_file()}
    assert after == before
