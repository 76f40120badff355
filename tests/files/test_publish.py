"""Laws of directories: the old one or the whole new one, wherever it is and whoever comes."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import Stop, contents

from qlora_kit.errors import ResourceError
from qlora_kit.files.aside import new_directory
from qlora_kit.files.publish import mend, publish


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


OLD = {"config.json": "old", "model.safetensors": "old", "folder/a": "old", "only_old": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "folder/b": "new", "only_new": "new"}


def lay(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too; a lock that nobody holds says nothing."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# A volume is a mount point; where none can be made, the working directory is filled from inside
# just so.
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(params=["beside", "volume", "inside"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    path = tmp_path / "parent" / "out"
    path.mkdir(parents=True)
    if request.param == "inside":
        monkeypatch.chdir(path)
    if request.param != "volume":
        yield path
        return
    options = (b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=1m")
    if LIBC.mount(*options):
        pytest.skip(f"no mount: {os.strerror(ctypes.get_errno())}")
    yield path
    LIBC.umount2(os.fsencode(path), 2)


def test_the_new_files_take_the_place_of_the_old_ones(place: Path) -> None:
    for old, new in ((OLD, NEW), (NEW, OLD)):
        shutil.rmtree(place, ignore_errors=True)
        lay(place, old)
        with publish(place) as folder:
            lay(folder, new)
            assert files_of(place).items() >= old.items()
        assert files_of(place) == new
        assert os.listdir(place.parent) == ["out"]
        assert sorted(os.listdir(place)) == sorted({Path(name).parts[0] for name in new})


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Stop()])
def test_what_fails_leaves_the_old_files(place: Path, error: BaseException) -> None:
    lay(place, OLD)

    def fail() -> None:
        with publish(place) as folder:
            lay(folder, NEW)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files_of(place.parent) == {f"out/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize("name", ["mine", "folder/mine", "config.json"])
def test_what_came_meanwhile_is_not_lost(place: Path, name: str) -> None:
    lay(place, OLD)

    def interrupted() -> None:
        with publish(place) as new:
            lay(new, NEW)
            (place / name).unlink(missing_ok=True)
            (place / name).write_text("of somebody else")

    with pytest.raises(ResourceError, match=f"out/{name} came there, or was changed, while"):
        interrupted()
    assert files_of(place) == {**OLD, name: "of somebody else"}
    assert os.listdir(place.parent) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "export"])
def test_what_came_to_a_place_that_was_free_is_not_lost(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "out"

    def interrupted() -> None:
        with publish(place) as new:
            lay(new, NEW)
            if kind == "link":
                place.symlink_to("elsewhere")
            elif kind == "file":
                place.write_text("precious")
            elif kind == "folder":
                lay(place, {"a/b": "precious"})
            else:
                with publish(place) as other:
                    lay(other, OLD)

    with pytest.raises(ResourceError, match=r"out.* came there, or was changed, while"):
        interrupted()
    expected = {"file": {"out": "precious"}, "folder": {"out/a/b": "precious"}, "link": {}}
    expected["export"] = {f"out/{name}": text for name, text in OLD.items()}
    assert files_of(tmp_path) == expected[kind]
    assert os.listdir(tmp_path) == ["out"]


def test_two_at_once_are_told_of_each_other(place: Path) -> None:
    with publish(place) as folder:
        lay(folder, NEW)
        other = publish(place)
        with pytest.raises(ResourceError, match=f"in use by process {os.getpid()}"):
            other.__enter__()
    assert files_of(place) == NEW


def test_nobody_mends_under_a_living_process(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as folder:
        lay(folder, NEW)
        with new_directory(tmp_path / "out") as other:
            lay(other, OLD)
        mend(tmp_path / "out")
        assert files_of(folder) == NEW
    assert files_of(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_the_mode_of_a_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    with publish(tmp_path / "out") as folder:
        lay(folder, NEW)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_what_another_user_left_under_our_names_is_neither_used_nor_removed(
    tmp_path: Path,
) -> None:
    if os.getuid():
        pytest.skip("only root can give a file away")
    for name in (".out.1.tmp", ".out.1.old", ".out.2.old"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 65534, 65534)
    (tmp_path / ".out.3.old").symlink_to("elsewhere")
    names = set(os.listdir(tmp_path))
    with publish(tmp_path / "out") as folder:
        lay(folder, NEW)
    assert set(os.listdir(tmp_path)) == {"out", *names}
    assert files_of(tmp_path / "out") == NEW


def test_in_the_directory_of_another_user_ones_own_is_filled(tmp_path: Path) -> None:
    """In a parent that may not be written to, and in a sticky one, whose entries cannot move."""
    if os.getuid():
        pytest.skip("only root can play another user")
    for mode in (0o755, 0o1777):
        # Not pytest's own folder, which nobody else may look into.
        parent = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
        os.chmod(parent, mode)
        place = lay(parent / "out", OLD)
        if mode == 0o755:
            for path in (place, *place.rglob("*")):
                os.chown(path, 65534, 65534)
        else:
            place.chmod(0o777)
            for path in place.rglob("*"):
                path.chmod(0o777)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setuid(65534)
                with publish(place) as folder:
                    lay(folder, NEW)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert files_of(parent) == {f"out/{name}": text for name, text in NEW.items()}
        shutil.rmtree(parent)


CALLS = ("mkdir", "rename", "rmdir", "unlink", "replace")


def killed_at(place: Path, number: int, after: bool) -> bool:
    """Publish in a child that is killed at one call that changes a directory; whether it was."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*arguments: object, **options: object) -> object:
                nonlocal seen
                seen += 1
                if seen == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                here = seen
                try:
                    return call(*arguments, **options)
                finally:  # also where it is refused
                    if here == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        code = 1
        try:
            with publish(place) as folder:
                lay(folder, NEW)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before", [OLD, {}], ids=["over an old one", "into an empty one"])
def test_killed_at_any_call_one_of_both_is_whole_and_the_next_one_works(
    place: Path, before: dict[str, str]
) -> None:
    number, found = 0, set()
    while True:
        number += 1
        for after in (False, True):
            for left in list(place.iterdir()):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            lay(place, before)
            if not killed_at(place, number, after):
                assert number > 5
                assert found == {"old", "new"}
                return
            mend(place)
            now = files_of(place)
            assert now in (before, NEW), (number, after)
            found.add("old" if now == before else "new")
            assert [name for name in os.listdir(place.parent) if name != "out"] == []
            with publish(place) as folder:
                lay(folder, NEW)
            assert files_of(place) == NEW
            assert os.listdir(place.parent) == ["out"]
            assert sorted(os.listdir(place)) == sorted({Path(name).parts[0] for name in NEW})
