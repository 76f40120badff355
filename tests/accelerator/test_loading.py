"""Loading onto a device: the files' bytes go up once, in pieces, and nothing is read back."""

from __future__ import annotations

import pytest
from accelerator import accelerator, replaced, saved
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base import tensors
from qlora_kit.base.load import fill
from qlora_kit.base.safetensors_file import read_entries


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_loading_copies_the_files_once_and_reads_nothing(bits: int) -> None:
    directory = saved("llama2")
    with unset_fake_temporarily():
        entries = read_entries(directory).values()
    largest = max(entry.end - entry.start for entry in entries)
    assert largest > 4096
    with accelerator() as card, replaced(tensors, "PIECE", 4096):
        base = card.open(directory, bits=bits)
        with card.watch() as seen:
            model = fill(base, lambda entry, into: None)
        buffers = [one.nbytes for one in model.buffers()]
    assert seen.reads == seen.copied_out == []
    pieces = [one.nbytes for one in seen.copied_in]
    assert max(pieces) <= 4096
    # Of a loop a plan traces some turns only.
    assert sum(pieces) <= sum(entry.end - entry.start for entry in entries) + sum(buffers)
