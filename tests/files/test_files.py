"""Laws of writing: the old thing or the whole new thing, and nothing beside it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from folders import Stop, contents

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.files.atomic import check_output, check_room, replace_file, write_file
from qlora_kit.files.lock import locked


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


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no file system without room")
def test_where_no_file_can_be_nothing_is_said_of_a_full_disk() -> None:
    with pytest.raises(ResourceError, match="offers no room for files") as refused:
        check_room(Path("/proc/run"), 1, "a file")
    assert "free some space" not in str(refused.value)


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
        "from qlora_kit.files.atomic import write_file\n"
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


def test_an_empty_or_new_place_is_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "base").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_output(target, overwrite=False, inputs=[tmp_path / "base"])
    assert sorted(contents(tmp_path)) == ["base", "empty"]


def test_a_used_place_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    with pytest.raises(ConfigError, match="used is not empty") as caught:
        check_output(tmp_path / "used", overwrite=False)
    assert "--overwrite" in caught.value.remedy
    check_output(tmp_path / "used", overwrite=True)


RUN = '{"config": {}, "versions": {}, "train": {}}'
MADE: dict[str, dict[str, str]] = {
    "an export": {
        "export.json": '{"merge_base": "original", "dtype": "bf16", "kl": 0}',
        "config.json": "{}",
        "model-00001-of-00002.safetensors": "",
        "model.safetensors.index.json": "",
        "tokenizer.json": "",
        "tokenizer_config.json": "",
        "special_tokens_map.json": "",
        "generation_config.json": "",
        "chat_template.jinja": "",
    },
    "a run": {
        "run.json": RUN,
        "config.yaml": "",
        "metrics.jsonl": "",
        "README.md": "",
        "adapter_config.json": "",
        "adapter_model.safetensors": "",
        "checkpoint-12/state.json": "",
        "wandb/x": "",
    },
    "a killed run": {".lock": "12\n", "metrics.jsonl": ""},
    "a killed run that replaces": {".lock": "12 replaces\n", ".replaced.part/run.json": ""},
    "a run killed at a checkpoint": {"checkpoint-3/manifest.json": "{}", "checkpoint-3/x": ""},
    "an export in an ext4 volume": {"export.json": '{"merge_base": "", "dtype": ""}'},
}
OTHERS: dict[str, dict[str, str]] = {
    "a file of one's own beside a run": {"run.json": RUN, "notes.txt": ""},
    "a folder of one's own beside a run": {"run.json": RUN, "mine/precious": ""},
    "another model": {"config.json": "{}", "model.safetensors": "", "tokenizer.json": ""},
    "another adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
    "a run.json of another program": {"run.json": '{"steps": 3}'},
    "a run.json that is none": {"run.json": "{" * 100_000},
    "a lock of another program": {".lock": "held by nobody\n", "metrics.jsonl": ""},
    "a git checkout": {"export.json": '{"merge_base": "", "dtype": ""}', ".git/HEAD": ""},
    "an empty folder": {"folder/": ""},
}


def lay(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("what", MADE)
def test_what_a_run_or_an_export_made_may_be_replaced(tmp_path: Path, what: str) -> None:
    check_output(lay(tmp_path / "used", MADE[what]), overwrite=True)


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_else_may(tmp_path: Path, what: str) -> None:
    place = lay(tmp_path / "used", OTHERS[what])
    before = contents(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no run and no export made|neither a run|a git checkout"
    ):
        check_output(place, overwrite=True)
    assert contents(tmp_path) == before
    check_output(place, overwrite=False, goes_on=True)


def test_neither_home_nor_the_working_directory_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "a", MADE["an export"])
    (tmp_path / "a" / "checkpoint-1").mkdir()
    for place in (tmp_path / "a", tmp_path / "a" / "checkpoint-1"):
        monkeypatch.setenv("HOME", str(place))
        with pytest.raises(ConfigError, match="is or holds the home directory"):
            check_output(tmp_path / "a", overwrite=True)
        monkeypatch.setenv("HOME", "/nowhere")
        monkeypatch.chdir(place)
        with pytest.raises(ConfigError, match="is or holds the working directory"):
            check_output(tmp_path / "a", overwrite=True)
    monkeypatch.chdir(tmp_path)
    check_output(tmp_path / "a", overwrite=True)


def test_a_place_that_somebody_writes_to_is_not_replaced(tmp_path: Path) -> None:
    place = lay(tmp_path / "used", MADE["an export"])
    with locked(place), pytest.raises(ResourceError, match=f"in use by process {os.getpid()}"):
        check_output(place, overwrite=True)
    check_output(place, overwrite=True)


def test_a_new_volume_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    if os.getuid() == 0:
        check_output(tmp_path, overwrite=False)
        os.chown(tmp_path / "lost+found", 65534, 65534)
    with pytest.raises(ConfigError, match="is not empty"):
        check_output(tmp_path, overwrite=False)


def test_a_loop_of_links_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="is a loop of links"):
        check_output(tmp_path / "a", overwrite=True)


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
        "from qlora_kit.files.atomic import check_output\n"
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
