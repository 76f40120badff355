"""The preflight of a real run in an address space that is too small for its largest batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from faults.harness import Job, leftovers

from qlora_kit.training.checkpoint import newest

LONG, SHORT, ROWS, BATCH = 6000, 20, 60, 2


@pytest.fixture(scope="module")
def long_job(server, tmp_path_factory) -> Job:
    """A wide model with a long context; short rows, and one long one at the end of the file."""
    from families import save_checkpoint

    directory: Path = tmp_path_factory.mktemp("long")
    save_checkpoint(
        directory / "base", "llama2", intermediate_size=4096, max_position_embeddings=4096
    )
    lines = [
        json.dumps({"text": " ".join(f"w{3 + (number + j) % 80}" for j in range(length))})
        for number, length in enumerate([SHORT] * (ROWS - 1) + [LONG])
    ]
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n")
    job = Job(directory, server)
    job = job.having("--data", str(directory / "rows.jsonl"), "--eval_fraction", "0")
    job = job.having("--eval_steps", "0", "--max_length", "4096", "--max_steps", "30")
    job = job.having("--tiled_mlp", "false")  # in tiles the row fits
    return replace(job, arguments=(*job.arguments, "--batch_size", str(BATCH)))


def test_one_long_row_at_the_end_fails_at_once(long_job, tmp_path):
    outcome = long_job.run(tmp_path / "run", inject="little_room")
    assert outcome.code == 4, outcome.output
    for part in (
        "one row of 4096 tokens",
        "bytes planned",
        "bytes free",
        "--max_length below",
        "--bits 4",
    ):
        assert part in outcome.error, part
    assert "step 1/30" not in outcome.output
    assert not (tmp_path / "run").exists()


def test_without_it_the_same_run_fails_after_many_steps(long_job, tmp_path):
    """With the seed of this run the long row is in a late step, and all before it is done."""
    outcome = long_job.run(tmp_path / "run", inject="little_room_without_preflight")
    assert outcome.code == 4, outcome.output
    assert newest(tmp_path / "run")[0].step >= 3


def test_where_one_row_fits_the_run_says_so_and_goes_on(long_job, tmp_path):
    outcome = long_job.run(tmp_path / "run", inject="room_for_half")
    assert outcome.code == 0, outcome.output
    said = "out of memory with 2 rows at a time: going on with 1 and twice the accumulation"
    # Before the first step, not when the long row comes.
    assert outcome.output.index(said) < outcome.output.index("step 1/30")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["micro_batch_rows"] == 1
    assert leftovers(tmp_path / "run") == []
