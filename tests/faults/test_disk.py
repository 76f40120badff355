"""Laws of a disk that is full, small, or may not be written to."""

from __future__ import annotations

import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
from faults.harness import Fault, leftovers, result_of

from qlora_kit.training.checkpoint import newest


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="no right to mount a tmpfs")


def mounted(job, tmp_path, size: str, script: str) -> str:
    """Run Python lines in a fork whose own mount of a tmpfs nobody else sees."""
    place = tmp_path / "small"
    place.mkdir()
    code = textwrap.dedent(
        """
        import contextlib, io, os, subprocess
        from pathlib import Path
        from qlora_kit.commands.finetune import main

        def run(*extra):
            error = io.StringIO()
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                code = main([*command, *extra])
            return code, (error.getvalue().strip().splitlines() or [""])[-1]

        def mount(*options):
            subprocess.run(["mount", *options, str(place)], check=True)
        """
    )
    code += f"command = {job.command(place / 'run')!r}\nplace = Path({str(place)!r})\n"
    code += f"mount('-t', 'tmpfs', '-o', 'size={size}', 'tmpfs')\n" + textwrap.dedent(script)
    done = job.run_command([], inject="own_mounts", script=code)
    assert done.code == 0, done.output
    return done.output


@needs_mount
def test_a_disk_too_small_for_the_first_save_is_refused_at_the_start(job, tmp_path):
    said = mounted(
        job,
        tmp_path,
        "64k",
        """
        code, error = run()
        print(code, error, list(place.iterdir()))
        """,
    )
    assert said.startswith("4 error: ")
    assert "bytes, and" in said
    assert "are free" in said
    assert said.rstrip().endswith("[]")


@needs_mount
def test_a_disk_that_fills_keeps_the_last_checkpoint(job, tmp_path):
    """It holds the first checkpoints; then a stranger takes the rest of it."""
    said = mounted(
        job,
        tmp_path,
        "2m",
        """
        from qlora_kit.run import saving as module
        from qlora_kit.training.checkpoint import newest
        save, saves = module.save_checkpoint, []
        def fills(directory, step, *rest):
            saves.append(step)
            if step == 3:
                stats = os.statvfs(place)
                free = stats.f_bavail * stats.f_frsize
                with open(place / "stranger", "ab") as file:
                    file.write(bytes(max(0, free - 16384)))
            return save(directory, step, *rest)
        module.save_checkpoint = fills
        code, error = run()
        print(code, error)
        found, notes = newest(place / "run")
        print(found.step, notes, sorted(p.name for p in (place / "run").iterdir()))
        print(saves)
        (place / "stranger").unlink()
        module.save_checkpoint = save
        print(run("--resume_from_checkpoint", "auto")[0])
        """,
    )
    first, second, tries, resumed = said.strip().splitlines()
    assert first.startswith("4 error: ")
    assert "checkpoint-3 needs" in first
    assert second.startswith("2 [] ")
    assert ".tmp" not in second
    assert tries.count("3") >= 2  # tried again once the older one had gone
    assert resumed == "0"


@needs_mount
def test_a_directory_that_became_read_only_is_refused_at_the_start(job, tmp_path):
    said = mounted(
        job,
        tmp_path,
        "8m",
        """
        mount("-o", "remount,ro")
        print(*run())
        """,
    )
    assert said.startswith("4 error: ")
    assert "may not be written to" in said or "Read-only" in said


def test_a_place_without_permission_is_refused_at_the_start(job, tmp_path):
    place = tmp_path / "locked"
    place.mkdir()
    place.chmod(0o555)
    refused = job.run(place / "run", inject="without_privileges")
    assert refused.code == 4, refused.output
    assert "step 1" not in refused.output
    assert "may not be written to" in refused.error
    assert str(place) in refused.error
    assert list(place.iterdir()) == []


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(job, output):
    """RLIMIT_FSIZE below the size of the tensors' file, above that of the JSON files."""
    failed = job.run(output, limits={"RLIMIT_FSIZE": 8192})
    assert failed.code == 4, failed.output
    assert "File too large" in failed.error
    assert not output.exists()


def test_a_parent_that_is_a_file_is_refused(job, tmp_path):
    (tmp_path / "file").write_text("x")
    refused = job.run(tmp_path / "file" / "run")
    assert refused.code == 4, refused.output
    assert "is a file" in refused.error
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_tried_again_after_an_older_checkpoint_went(job, reference, output):
    """The fault strikes once, in the third save; a second try then has room."""
    failed_once = job.run(output, fault=Fault(1, "fail", path=".checkpoint-3."))
    assert failed_once.code == 0, failed_once.output
    assert result_of(output) == reference
    assert leftovers(output) == []


def test_stale_files_of_a_killed_save_are_cleared(job, reference, output):
    killed = job.run(output, fault=Fault(4, path=".checkpoint-1."))
    assert killed.code == -signal.SIGKILL
    (output / ".checkpoint-1.123.tmp").mkdir(exist_ok=True)
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert leftovers(output) == []
    assert result_of(output) == reference
    assert newest(Path(output))[1] == []
