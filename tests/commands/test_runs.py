"""`qlora-kit runs` says what runs left, of finished, interrupted and broken ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_kit import finetune
from qlora_kit.commands.runs import main
from qlora_kit.commands.terminal import size
from qlora_kit.files.lock import locked
from qlora_kit.run.runs import BROKEN, FINISHED, INTERRUPTED, RUNNING, find_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, workshop: Any) -> Path:
    """A finished run, one that was interrupted after some steps, and folders that are none."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"model": workshop.base, "data": workshop.rows, "save_steps": 1, "eval_fraction": 0.5}
    options |= {"bits": 4, "gradient_accumulation_steps": 1}
    finetune(output_dir=folder / "done", max_steps=2, **options)
    stopped = folder / "stopped"

    def interrupt() -> None:
        # Any of them: an early one may be pruned before it is seen.
        while not any(stopped.glob("checkpoint-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        finetune(output_dir=stopped, max_steps=5000, lora_r=3, **options)
    thread.join()
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 9999, "lo')  # a kill in the middle of a line leaves half of it
    (folder / "empty").mkdir()
    (folder / "else").mkdir()
    (folder / "else" / "notes.txt").write_text("x")
    return folder


def test_finished_and_interrupted_runs_are_listed_with_what_they_say(runs: Path) -> None:
    done, stopped = find_runs(runs)
    record = json.loads((runs / "done" / "run.json").read_text())
    assert (done.name, done.state, done.options) == ("done", FINISHED, record["config"])
    assert done.loss_before == record["eval"]["loss_before"]
    assert done.loss_after == record["eval"]["loss_after"]
    assert done.peak_bytes == record["memory"]["measured"]["peak"]
    assert (done.steps, done.seconds) == (record["train"]["steps"], record["train"]["seconds"])
    last = json.loads((runs / "stopped" / "metrics.jsonl").read_text().splitlines()[-2])
    assert stopped.state == INTERRUPTED
    assert stopped.options["lora_r"] == 3
    assert (stopped.steps, stopped.last_loss) == (last["step"], last["loss"])
    assert stopped.peak_bytes is None  # a log has the bytes of the process, not of tensors
    assert (stopped.loss_before, stopped.loss_after) == (done.loss_before, None)
    assert stopped.tokens
    assert find_runs(runs / "done") == [done]


def test_a_run_that_somebody_writes_is_running(runs: Path) -> None:
    with locked(runs / "stopped"):
        assert find_runs(runs / "stopped")[0].state == RUNNING


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"train": 1}', '{"train": {}, "eval": null}', '{"a": 1, "a": 2}']
)
def test_a_broken_result_is_listed_as_broken(runs: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(runs / "done", tmp_path / "done")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(text)
    found = {run.name: run for run in find_runs(tmp_path)}
    assert found["done"].state == FINISHED
    assert found["bad"].state == BROKEN
    assert found["bad"].problem


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [(None, "config", None), ("train", "seconds", "9"), ("train", "steps", []), ("eval", None, 3)],
)
def test_a_result_of_other_kinds_ends_no_listing(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: Any,
    option: Any,
    value: Any,
) -> None:
    record = json.loads((runs / "done" / "run.json").read_text())
    (record if part is None or option is None else record[part])[option or part] = value
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(json.dumps(record))
    shutil.copytree(runs / "done", tmp_path / "done")
    for json_too in ([], ["--json"]):
        assert main(["--runs_dir", str(tmp_path), *json_too]) == 0
        assert "broken" in capsys.readouterr().out


def test_two_runs_are_compared_by_what_differs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--runs_dir", str(runs), "--compare", "done", "--compare", str(runs / "stopped")]
    assert main([*both, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["options"] == {"lora_r": [16, 3], "max_steps": [2, 5000]}
    assert [run["name"] for run in said["runs"]] == ["done", "stopped"]
    assert main(both) == 0
    shown = capsys.readouterr().out
    assert "lora_r" in shown
    assert f"{find_runs(runs)[0].loss_after:.4f}" in shown
    assert main(["--runs_dir", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "stopped" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_at_80_columns_names_break_at_their_parts_and_figures_not_at_all(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "llama-3.1-8b-instruct-customer_questions-of-2026-4bit-second"
    for folder in (name, f"{name}-2"):
        shutil.copytree(runs / "done", tmp_path / folder)
    shutil.copytree(runs / "stopped", tmp_path / "stopped")
    done, stopped = find_runs(runs)
    parts = re.findall(r"[^-_]+", name)
    both = ["--compare", name, "--compare", f"{name}-2", "--runs_dir"]
    for arguments in (["--runs_dir"], both):
        assert main([*arguments, str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert "…" not in shown
        for part in parts:
            assert shown.count(part) == 2
        assert shown.count(size(done.peak_bytes)) == 2
    assert main(["--runs_dir", str(tmp_path)]) == 0
    assert f"trained {stopped.last_loss:.2f}" in capsys.readouterr().out
    record = json.loads((tmp_path / name / "run.json").read_text())
    record["config"] |= {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}
    (tmp_path / name / "run.json").write_text(json.dumps(record))
    assert main([*both, str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for option in ("target_modules", *record["config"]["target_modules"]):
        assert option in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--runs_dir nowhere", "nowhere"),
        ("--runs_dir {runs}/empty", "holds no run"),
        ("--runs_dir {runs} --compare done", "--compare A --compare B"),
        ("--runs_dir {runs} --compare done --compare empty", "--compare empty"),
        ("--runs_dir {runs} --compare done --compare done --compare done", "two runs"),
    ],
)
def test_what_is_no_run_is_refused_by_name(
    runs: Path, arguments: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.format(runs=runs).split()) in (2, 3)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last
