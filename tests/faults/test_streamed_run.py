"""A run whose base is streamed ends in the bytes of one whose base is resident, killed or not."""

from __future__ import annotations

import signal

from faults.harness import STEPS, Fault, result_of

STREAMED = ("--offload_base", "true")


def test_a_streamed_run_that_is_killed_ends_in_the_bytes_of_a_resident_one(job, output):
    this = job.having("--bits", "4", "--gradient_checkpointing", "full", "--packing")
    whole = output.with_name("whole")
    assert this.run(whole).code == 0
    killed = this.run(output, *STREAMED, fault=Fault(2, path=f"checkpoint-{STEPS - 2}"))
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = this.run(output, *STREAMED, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert f"checkpoint-{STEPS - 3}" in resumed.output
    assert result_of(output) == result_of(whole)
    # Where a base lies is no part of what a run is: another start may place it elsewhere.
    again, path = output.with_name("again"), str(output / f"checkpoint-{STEPS - 1}")
    went_on = this.run(again, "--resume_from_checkpoint", path)
    assert went_on.code == 0, went_on.output
    assert result_of(again) == result_of(whole)
