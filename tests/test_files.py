"""Laws of writing: the old thing or the whole new thing, and nothing beside it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.files import check_output, new_directory, replace_file, write_file


class Stop(BaseException):
    """Neither an `Exception` nor foreseen, like a signal."""


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, and what a file holds."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_is_written_whole_with_the_mode_of_the_umask(tmp_path: Path, umask: None) -> None:
    target = tmp_path / "file"
    for content in (b"first", b"", b"third" * 100_000):
        write_file(target, content)
        assert contents(tmp_path) == {"file": content}
        assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_writer_that_makes_a_private_file_is_corrected(tmp_path: Path, umask: None) -> None:
    def private(path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    replace_file(tmp_path / "file", private)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("x"), Stop()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_bytes(b"old")
    before = (tmp_path / "file").stat()

    def fail(path: Path) -> None:
        path.write_bytes(b"half of the new o")
        raise error

    with pytest.raises(type(error)):
        replace_file(tmp_path / "file", fail)
    with pytest.raises(type(error)):
        replace_file(tmp_path / "new", fail)
    assert (tmp_path / "file").stat() == before  # first: reading moves the time of access
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    script = (
        "import pathlib, resource, signal, sys\n"
        "from qlora_kit.files import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_file(pathlib.Path(sys.argv[1]), b'x' * 100_000)\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "27\n"  # EFBIG
    assert contents(tmp_path) == {"file": b"old"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert sorted(contents(tmp_path)) == ["link", "real"]


def test_a_device_or_a_directory_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "folder", "null"):
        with pytest.raises(ResourceError, match="not a regular file"):
            write_file(tmp_path / name, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "null", "pipe"]


def test_a_directory_appears_when_it_is_whole(tmp_path: Path, umask: None) -> None:
    target = tmp_path / "a" / "b" / "out"
    with new_directory(target) as aside:
        (aside / "one").write_bytes(b"1")
        assert aside.parent == target.parent
        assert not target.exists()
    assert contents(tmp_path) == {"a": None, "a/b": None, "a/b/out": None, "a/b/out/one": b"1"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


def test_a_directory_is_replaced_and_nothing_of_the_old_one_is_left(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "old").write_bytes(b"old")
    with new_directory(target) as aside:
        (aside / "new").write_bytes(b"new")
        assert (target / "deep" / "old").exists()
    assert contents(tmp_path) == {"out": None, "out/new": b"new"}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Stop()])
def test_a_failed_directory_leaves_everything_as_it_was(
    tmp_path: Path, error: BaseException
) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "old").write_bytes(b"old")
    before = contents(tmp_path)

    def fail(target: Path) -> None:
        with new_directory(target) as aside:
            (aside / "half").write_bytes(b"x")
            raise error

    for target in (tmp_path / "out", tmp_path / "new", tmp_path / "runs" / "of" / "today"):
        with pytest.raises(type(error)):
            fail(target)
        assert contents(tmp_path) == before


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    stale = tmp_path / f".out.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "half").write_bytes(b"x")
    with new_directory(tmp_path / "out") as aside:
        (aside / "one").write_bytes(b"1")
    assert contents(tmp_path) == {"out": None, "out/one": b"1"}


def test_an_empty_or_new_place_is_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "base").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_output(target, overwrite=False, inputs=[tmp_path / "base"])
    assert sorted(contents(tmp_path)) == ["base", "empty"]


def test_a_used_place_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="used is not empty") as caught:
        check_output(tmp_path / "used", overwrite=False)
    assert "--overwrite" in caught.value.remedy
    check_output(tmp_path / "used", overwrite=True)


@pytest.mark.parametrize("target", ["base", "base/out", "base/../base/out", ".", "link", "link/x"])
def test_no_output_over_or_in_what_is_read(tmp_path: Path, target: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("base")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="overlaps with"):
            check_output(tmp_path / target, overwrite, [tmp_path / "base"])
    assert contents(tmp_path) == before


def test_a_file_that_is_read_is_not_in_the_output_but_may_be_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"data overlaps with .*rows\.jsonl, which is read"):
        check_output(tmp_path / "data", True, [tmp_path / "data" / "rows.jsonl"])
    check_output(tmp_path / "data" / "out", False, [tmp_path / "data" / "rows.jsonl"])


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(ResourceError, match="is a file"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_a_place_that_may_not_be_written_to_is_refused() -> None:
    script = (
        "import os, pathlib, sys\n"
        "from qlora_kit.errors import ResourceError\n"
        "from qlora_kit.files import check_output\n"
        "if os.getuid() == 0:\n"
        "    os.setuid(65534)  # root may write anywhere\n"
        "try:\n"
        "    check_output(pathlib.Path(sys.argv[1]), False)\n"
        "except ResourceError as error:\n"
        "    print(error.problem)\n"
    )
    # Not pytest's own folder, which nobody else may look into.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        done = subprocess.run(
            [sys.executable, "-c", script, f"{folder}/out"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == f"--output_dir {folder}/out: {folder} may not be written to\n"
