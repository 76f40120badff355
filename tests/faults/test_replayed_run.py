"""A run whose layers are replayed from the host is the run without that, killed and resumed too."""

from __future__ import annotations

import signal

import pytest
from faults.harness import Fault, result_of


@pytest.mark.parametrize(
    ("level", "then"),
    [("full", "--offload_activations"), ("selective", "--no_offload_activations")],
)
def test_it_ends_in_the_same_bytes_wherever_it_goes_on(job, output, level, then):
    """With dropout, packs and two micro-batches a step; resumed with the option or without it."""
    this = job.having(
        *("--gradient_checkpointing", level, "--packing", "--gradient_accumulation_steps", "2")
    )
    plain = this.run(output)
    assert plain.code == 0, plain.output
    moved = output.with_name("moved")
    killed = this.run(moved, "--offload_activations", fault=Fault(3, "inside", "checkpoint-3"))
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = this.run(moved, then, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(moved) == result_of(output)
