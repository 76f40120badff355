"""Laws of the numbers that a run leaves on the disk, on real files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.run.directory import run_directory
from qlora_kit.run.metrics import (
    MetricsLog,
    start_trackers,
    versions,
    write_json,
    write_text,
)


class ListTracker(GeneralTracker):
    """A tracker of accelerate's own kind that keeps what it gets."""

    name = "list"
    requires_logging_directory = False

    def __init__(self, run_name="run"):
        super().__init__()
        self.run_name, self.heard, self.config, self.finished = run_name, [], None, False

    @property
    def tracker(self):
        return self.heard

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.heard.append((step, values))

    def finish(self):
        self.finished = True


class OfflineTracker(ListTracker):
    name = "offline"

    def start(self):
        raise RuntimeError("no network")


@pytest.fixture
def registered(monkeypatch):
    """Our two trackers beside accelerate's own, as a user's code registers them."""
    for tracker in (ListTracker, OfflineTracker):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, tracker.name, tracker)


def strict(text):
    """JSON by the standard: NaN and Infinity are refused."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_versions_are_named_without_importing_anything():
    code = (
        "import sys; from qlora_kit.run.metrics import start_trackers, versions; versions();"
        "assert not start_trackers('none', '.', {});"
        "print([name for name in ('torch', 'bitsandbytes', 'transformers', 'accelerate')"
        " if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    import torch

    found = versions()
    assert list(found) == [
        *("python", "qlora_kit", "torch", "bitsandbytes"),
        *("transformers", "accelerate", "safetensors"),
    ]
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert strict(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]
    # A directory is not replaced by a file.
    (tmp_path / "taken").mkdir()
    with pytest.raises(ResourceError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert sorted(os.listdir(tmp_path)) == ["run.json", "taken"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    # A limit on the size of files stops the write half way, as a full disk does.
    code = (
        "import resource, signal, sys; from qlora_kit.run.metrics import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "write_text(sys.argv[1], 'x' * 10000)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "OSError: [Errno 27]" in run.stderr
    assert strict(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_text_and_names_of_any_kind_are_written(tmp_path):
    undecodable = os.fsdecode(b"rows-\xff.jsonl")
    write_json(tmp_path / "a.json", {"data": undecodable, "你": "😀"})
    assert strict((tmp_path / "a.json").read_text("utf-8")) == {"data": undecodable, "你": "😀"}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    bad = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"), True, None)}}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": [None, True, None]}}
    write_json(tmp_path / "run.json", bad)
    assert strict((tmp_path / "run.json").read_text()) == expected
    with MetricsLog(tmp_path) as log:
        log.write(bad)
    assert strict((tmp_path / "metrics.jsonl").read_text()) == expected


def test_each_step_is_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 4):
            log.write({"step": step, "loss": 1 / step})
            lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
            assert lines.pop() == ""
            assert [strict(line)["step"] for line in lines] == list(range(1, step + 1))
    with MetricsLog(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "", "a new run begins anew"


def test_a_resumed_run_has_one_line_a_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"step": step, "note": "first\u2028run"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.write({"step": 4, "note": "resumed"})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [strict(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert strict(lines[3])["note"] == "resumed"
    with MetricsLog(tmp_path / ".", resume_step=0) as log:
        log.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_trackers_get_each_step_and_are_finished(tmp_path):
    tracker = ListTracker()

    def interrupted():
        with MetricsLog(tmp_path, trackers=[tracker]) as log:
            log.write({"step": 7, "loss": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tracker.heard == [(7, {"loss": 0.5})]
    assert tracker.finished
    late = ListTracker()
    with pytest.raises(FileNotFoundError):
        MetricsLog(tmp_path / "absent", trackers=[late])
    assert late.finished


@pytest.mark.usefixtures("registered")
def test_trackers_are_named_as_accelerate_knows_them(tmp_path):
    [tracker] = start_trackers(" list ,", tmp_path, {"r": 16, "targets": ["q", "v"]})
    assert isinstance(tracker, ListTracker)
    assert tracker.run_name == "qlora-kit"
    assert tracker.config == {"r": 16, "targets": "['q', 'v']"}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("names", ["tensorbord", "list,nothing", "none,list", "all"])
def test_an_unknown_tracker_is_refused_with_what_there_is(tmp_path, names):
    wrong = next(name for name in names.split(",") if name != "list")
    with pytest.raises(ConfigError, match=rf"no tracker {wrong} here \(available: .*list"):
        start_trackers(names, tmp_path, {})


@pytest.mark.usefixtures("registered")
def test_a_tracker_that_does_not_start_is_a_note_and_the_others_are_told(tmp_path):
    notes = []
    [tracker] = start_trackers("offline,list", tmp_path, {}, notes.append)
    assert isinstance(tracker, ListTracker)
    assert notes == ["offline does not start and is left out: RuntimeError: no network"]


def test_a_tracker_that_fails_in_the_middle_is_a_note_and_ends_no_run(tmp_path):
    class Failing(ListTracker):
        def log(self, values, step=None):
            super().log(values, step)
            raise ConnectionError("the network went")

    class Unfinished(ListTracker):
        def finish(self):
            raise TimeoutError("no answer")

    failing, unfinished, good, notes = Failing(), Unfinished(), ListTracker(), []
    trackers = [failing, unfinished, good]
    with MetricsLog(tmp_path, trackers=trackers, note=notes.append) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 0.5})
    assert [step for step, _ in failing.heard] == [1]
    assert [step for step, _ in good.heard] == [1, 2]
    assert good.finished
    assert notes == [
        "list is told no more: ConnectionError: the network went",
        "list is told no more: TimeoutError: no answer",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_keeps_nothing_leaves_what_others_put_there(tmp_path):
    def run():
        with run_directory(tmp_path / "out", overwrite=False) as place:
            (place.path / "metrics.jsonl").write_text("")
            (place.path / "notes.txt").write_text("mine")
            raise ValueError("ends")

    with pytest.raises(ValueError, match="ends"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
