"""New memory of the host: its pages at once, and nothing else of it changed."""

from __future__ import annotations

import platform
import resource
import sys

import pytest
import torch
from torch import Tensor

from qlora_kit.device.host_buffers import give_pages

KNOWN = sys.platform == "linux" and [*map(int, platform.release().split(".")[:2])] >= [5, 14]
NBYTES = 64 * 2**20
"""More than the C library takes from what was freed before."""


def faults_of_writing(memory: Tensor) -> int:
    """Pages that came while all of it was written."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not KNOWN, reason="needs Linux 5.14")
def test_given_pages_are_there_when_they_are_written() -> None:
    one_by_one = faults_of_writing(torch.empty(NBYTES, dtype=torch.uint8))
    given = torch.empty(NBYTES, dtype=torch.uint8)
    give_pages(given)
    assert faults_of_writing(given) < one_by_one / 10


@pytest.mark.parametrize(("start", "nbytes"), [(0, 0), (1, 10), (4000, 200), (5, 3 * 4096 + 7)])
def test_numbers_stay_wherever_the_memory_begins_and_ends(start: int, nbytes: int) -> None:
    memory = torch.arange(2**15) % 251
    before = memory.clone()
    give_pages(memory.view(torch.uint8)[start : start + nbytes])
    assert torch.equal(memory, before)
