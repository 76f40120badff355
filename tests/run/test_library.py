"""Laws of `qlora_kit.finetune`: it is the run of the command, called from Python."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time

import datasets
import pytest
from families import save_checkpoint

from qlora_kit import RunResult, finetune
from qlora_kit.commands.finetune import main
from qlora_kit.data.lines import GivenRows
from qlora_kit.errors import ConfigError, DataError, ModelError
from qlora_kit.run.reporter import Reporter, StepReporter

OPTIONS = {
    "bits": 4,
    "dtype": "fp32",
    "lora_r": 4,
    "lora_dropout": 0.1,
    "eval_fraction": 0.2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_steps": 2,
}
ROWS = [{"prompt": f"w{n} w{n + 1} w{n + 2}", "completion": f"w{n % 7} w3"} for n in range(30)]
TIMES = ("seconds", "tokens_per_s", "process", "resident")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny base and a file of rows."""
    place = tmp_path_factory.mktemp("library")
    save_checkpoint(place / "base")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place


@pytest.fixture(scope="module")
def commands(place):
    """The directory of the command's run on the file."""
    flags = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    output = place / "command"
    data = ["--data", str(place / "rows.jsonl"), "--output_dir", str(output)]
    assert main(["--model", str(place / "base"), *flags, *data]) == 0
    return output


def without_times(run):
    if isinstance(run, dict):
        return {name: without_times(value) for name, value in run.items() if name not in TIMES}
    return run


@pytest.mark.parametrize("name", ["data", "dataset"])
def test_data_that_is_none_is_said_to_be_the_sample_and_no_rows_are_refused(tmp_path, name):
    """None leaves an option alone; here it may be a variable that nobody filled."""
    (tmp_path / "mine").touch()  # so that the run ends before it trains
    said = pytest.warns(UserWarning, match="data is None: .* the package's sample")
    with said, pytest.raises(ConfigError, match="not empty"):
        finetune(output_dir=str(tmp_path), **{name: None})
    with pytest.raises(DataError, match=f"{name}: holds no row"):
        finetune(output_dir=str(tmp_path), **{name: []})


@pytest.mark.parametrize("kind", ["file", "list", "Dataset"])
def test_a_call_is_the_run_of_the_command(place, commands, kind, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    capfd.readouterr()
    result = finetune(
        model=place / "base",
        data={"file": place / "rows.jsonl", "list": ROWS, "Dataset": None}[kind]
        or datasets.Dataset.from_list(ROWS),
        output_dir=place / kind,
        **OPTIONS,
    )
    assert capfd.readouterr() == ("", "")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert isinstance(result, RunResult)
    assert result.output_dir == place / kind
    assert result.adapter.read_bytes() == (commands / "adapter_model.safetensors").read_bytes()
    theirs = json.loads((commands / "run.json").read_text())
    ours = without_times(json.loads((result.output_dir / "run.json").read_text()))
    differing = {"output_dir", "data"} if kind != "file" else {"output_dir"}
    for config in (ours["config"], theirs["config"]):
        for name in differing:
            del config[name]
    assert ours == without_times(theirs)
    assert result.steps == len(result.history) == theirs["train"]["steps"]
    assert (result.loss_before, result.loss_after) == (
        theirs["eval"]["loss_before"],
        theirs["eval"]["loss_after"],
    )
    assert result.memory_planned["peak"] >= result.memory_measured["peak"] > 0
    assert re.fullmatch(
        rf"<RunResult '{result.output_dir}', {result.steps} steps, "
        r"held-out loss \d+\.\d{3} -> \d+\.\d{3}>",
        repr(result),
    ), "a notebook shows a line"


class Told(Reporter, StepReporter):
    """Notes what it is told of the steps."""

    def __init__(self):
        self.calls = []

    def progress(self, total_steps, memory):
        return contextlib.nullcontext(self)

    def start(self, before):
        self.calls.append("start")

    def step(self, report, peak):
        self.calls.append("step")


def test_an_interrupted_call_loses_nothing_and_goes_on_with_the_same_rows(place, commands):
    handler, output = signal.getsignal(signal.SIGINT), place / "interrupted"

    def interrupt():
        # Any of them: an early one may be pruned before it is seen.
        while not any(output.glob("checkpoint-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    options = {"model": place / "base", "output_dir": output, **OPTIONS}
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT: after step"):
        finetune(data=ROWS, **options)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (output / "run.json").exists()
    for data, words in (
        (ROWS[:-1], "data: other contents"),
        (place / "none.jsonl", "no such file"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            finetune(data=data, resume_from_checkpoint="auto", **options)
    told = Told()
    result = finetune(data=ROWS, resume_from_checkpoint="auto", progress=told, **options)
    assert told.calls[:2] == ["start", "step"], "the time of steps is counted from the first on"
    assert result.adapter.read_bytes() == (commands / "adapter_model.safetensors").read_bytes()
    again = finetune(data=ROWS, resume_from_checkpoint="auto", **options)
    assert again == result, "a finished run gives its result again"


def test_given_rows_are_not_read_by_the_name_that_is_written_down(place):
    with pytest.raises(DataError, match=r"they lie in no file; .*finetune\(data=rows"):
        finetune(data=GivenRows(ROWS).name, model=place / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learnin_rate": 1}, "unknown option learnin_rate, did you mean learning_rate?"),
        ({"rank": 8}, "unknown option rank, did you mean lora_r?"),
        ({"bits": 3}, "bits must be 4, 8 or 16, got 3"),
        ({"config": "run.yaml"}, "unknown option config"),
        ({"data": {"train": []}}, "data is given a dict"),
        ({"data": iter(ROWS)}, "data is given a list_iterator"),
        ({"data": "sample", "dataset": "sample"}, "data is given twice, as dataset too"),
    ],
)
def test_an_option_is_refused_as_in_a_config_file(options, words):
    with pytest.raises(ConfigError) as caught:
        finetune(**options)
    assert words in str(caught.value)


def test_what_the_system_raises_is_an_error_of_ours(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        finetune(model=tmp_path / "none")
    with pytest.raises(DataError, match="data: holds no row"):
        finetune(data=[])


def test_progress_shows_what_the_command_shows(place, capfd):
    options = OPTIONS | {"max_steps": 1, "save_steps": 0}
    finetune(model=place / "base", data=ROWS, output_dir=place / "shown", progress=True, **options)
    shown = capfd.readouterr().out
    assert "step 1/1" in shown
    assert "trained   1 steps" in shown
