"""Laws of what a run leaves beside its weights, on real files."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.run.directory import run_directory
from qlora_kit.run.record import (
    MetricsLog,
    model_card,
    run_record,
    start_trackers,
    versions,
    write_json,
    write_text,
)


class ListTracker(GeneralTracker):
    """A tracker of accelerate's own kind that keeps what it hears."""

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


def a_run(**changes):
    config = {
        "model": "/home/someone/models/my base",
        "bits": 4,
        "quant_type": "nf4",
        "double_quant": True,
        "dtype": "bf16",
        "data": "/home/someone/secret/rows.jsonl",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "seed": 42,
        **changes.pop("config", {}),
    }
    parts = {
        "model": {
            "name": "/home/someone/models/my base",
            "revision": None,
            "fingerprint": "ab" * 32,
            "parameters": 260_032,
            "trainable_parameters": 4_096,
            "weight_bytes": 200_000,
        },
        "data": {
            "rows": 950,
            "skipped": 3,
            "tokens": 81_234,
            "supervised_tokens": 12_345,
            "unused": {},
        },
        "train": {
            "steps": 59,
            "seconds": 61.5,
            "tokens": 81_234,
            "tokens_per_s": 1320.9,
            "first_loss": 7.27,
            "last_loss": 2.16,
        },
        "evaluation": {"loss_before": 7.3, "loss_after": 2.2, "tokens": 678},
        "memory": {"device": "cpu", "planned": {"peak": 3 * 2**29}, "measured": {"peak": 2**30}},
    }
    return run_record(config=config, **(parts | changes))


def front_matter(card):
    head = re.match(r"---\n(.*?\n)---\n", card, flags=re.DOTALL)
    assert head is not None
    return yaml.safe_load(head[1])


def test_versions_are_named_without_importing_anything():
    code = (
        "import sys; from qlora_kit.run.record import start_trackers, versions; versions();"
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
        "import resource, signal, sys; from qlora_kit.run.record import write_text\n"
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
    write_text(tmp_path / "README.md", model_card(a_run(config={"data": undecodable})))


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


def test_trackers_hear_each_step_and_are_finished(tmp_path):
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


def test_a_run_has_the_documented_keys(tmp_path):
    run = a_run()
    assert list(run) == ["config", "versions", "model", "data", "train", "eval", "memory"]
    write_json(tmp_path / "run.json", run)
    assert strict((tmp_path / "run.json").read_text()) == run
    assert a_run(evaluation=None)["eval"] is None


def test_the_card_says_what_was_trained_on_what(tmp_path):
    card = model_card(a_run())
    assert front_matter(card) == {
        "base_model": "my base",
        "library_name": "peft",
        "tags": ["lora", "qlora"],
    }
    for part in (
        *("`rows.jsonl`, 950 rows", "81,234 tokens", "12,345 of them supervised"),
        *("4 bits, nf4, double quantization", "r 16, alpha 32.0", "`q_proj, v_proj`"),
        *("59 steps", "0.0002", "seed 42", "7.3000 before, 2.2000 after", "1321 tokens/s"),
        *("1.00 GiB measured, 1.50 GiB planned", "generate --adapter ADAPTER"),
    ):
        assert part in card
    assert "someone" not in card
    assert "None" not in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("tiny", "tiny"),
        ("./models/base", "base"),
        ("~/models/base/", "base"),
        ("/a/b/yes: no", "yes: no"),
        ("here/base", "base"),
    ],
)
def test_a_path_is_shown_by_its_last_part_and_a_hub_id_whole(tmp_path, monkeypatch, name, shown):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    run = a_run()
    run["model"]["name"] = name
    assert front_matter(model_card(run))["base_model"] == shown


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_cards_python_is_python(bits):
    run = a_run(config={"bits": bits})
    [code] = re.findall(r"```python\n(.*?)```", model_card(run), flags=re.DOTALL)
    ast.parse(code)
    assert (f"load_in_{bits}bit=True" in code) == (bits != 16)


def test_the_card_of_a_run_read_back_without_an_evaluation_or_finite_losses(tmp_path):
    run = a_run(evaluation=None)
    run["train"]["last_loss"] = float("nan")
    del run["memory"]["planned"]
    write_json(tmp_path / "run.json", run)
    card = model_card(strict((tmp_path / "run.json").read_text()))
    assert card == model_card(run)
    assert "held-out" not in card
    assert "not finite at the last" in card
    assert "1.00 GiB measured, not planned" in card


def test_a_run_that_keeps_nothing_leaves_what_others_put_there(tmp_path):
    def run():
        with run_directory(tmp_path / "out", overwrite=False) as place:
            (place.path / "metrics.jsonl").write_text("")
            (place.path / "notes.txt").write_text("mine")
            raise ValueError("ends")

    with pytest.raises(ValueError, match="ends"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
