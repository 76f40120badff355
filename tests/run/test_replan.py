"""Laws of a run whose device holds less than planned: more is recomputed before rows are halved."""

from __future__ import annotations

import contextlib
import json

import pytest
from capped_device import CappedDevice
from families import VOCABULARY, save_checkpoint, save_tokenizer

from qlora_kit import finetune

LAYERS, ROWS = 4, 4
OPTIONS = {
    "bits": 4,
    "dtype": "fp32",
    "device": "cpu",
    "max_length": 96,
    "batch_size": ROWS,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "lora_r": 4,
    "lora_dropout": 0.2,
    "eval_fraction": 0,
    "sample_prompts": 0,
    "optim": "adamw",
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains the same tiny model on a device of some capacity: its record and its adapter."""
    root = tmp_path_factory.mktemp("replan")
    save_checkpoint(root / "base", "llama2", num_hidden_layers=LAYERS, intermediate_size=192)
    save_tokenizer(root / "base")
    words = [f"w{3 + i % (VOCABULARY - 10)}" for i in range(94)]
    data = [{"text": " ".join(words[i:] + words[:i])} for i in range(2 * ROWS)]
    made = []

    def run(capacity=None, **options):
        made.append(root / f"run-{len(made)}")
        device = contextlib.nullcontext() if capacity is None else CappedDevice(capacity)
        with device:
            finetune(
                progress=True,
                model=str(root / "base"),
                data=data,
                output_dir=str(made[-1]),
                **OPTIONS,
                **options,
            )
        record = json.loads((made[-1] / "run.json").read_text())
        return record, (made[-1] / "adapter_model.safetensors").read_bytes()

    return run


def planned(record):
    return record["memory"]["planned"]["peak"]


@pytest.fixture(scope="module")
def given(train):
    """The runs of the two ends, their levels given: planned peak by level, and the adapter."""
    (none, adapter), (full, same) = (train(gradient_checkpointing=one) for one in ("none", "full"))
    assert adapter == same  # levels change no number
    assert planned(full) < 0.8 * planned(none)
    return planned(none), planned(full), adapter


def test_more_is_recomputed_until_it_fits_and_nothing_else_changes(train, given, capsys):
    """The run is that of a run whose levels were given; planned is what then is recomputed."""
    none, full, adapter = given
    capacity = (full + none) // 2
    record, same = train(capacity, memory_budget=str(none))
    assert adapter == same
    assert planned(record) <= capacity
    assert record["config"]["gradient_checkpointing"] == "auto"
    assert "micro_batch_rows" not in record["train"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"out of memory with {none} bytes planned (" in said
    assert f"going on with {planned(record)}, gradient checkpointing " in said
    assert "rows at a time" not in said


def test_rows_are_halved_when_nothing_is_left_to_recompute(train, given, capsys):
    none, full, _ = given
    record, _ = train(full - full // 20, memory_budget=str(none))
    assert planned(record) == full
    assert record["train"]["micro_batch_rows"] == ROWS // 2
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("gradient checkpointing full instead of") < said.index("rows at a time")


def test_a_level_that_was_given_is_kept(train, given, capsys):
    none, _, _ = given
    level = {"gradient_checkpointing": "none"}
    record, _ = train(none - none // 20, memory_budget=str(none), **level)
    assert planned(record) == none
    assert record["train"]["micro_batch_rows"] == ROWS // 2
    assert "instead of" not in capsys.readouterr().out
