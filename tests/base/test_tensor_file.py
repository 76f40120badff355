"""Laws of the writer of safetensors files: what others read of them, and what memory holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qlora_kit.base.safetensors_file import read_entries
from qlora_kit.base.tensor_file import write_tensors

MADE = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "halves": torch.randn(3, 5).to(torch.bfloat16),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3, dtype=torch.int8),
    "numbers": torch.randn(1, 3),
    "turned": torch.randn(6, 4).T,
    "whole": torch.arange(5),
    "exact": torch.randn(3, dtype=torch.float64),
}


def test_what_is_written_is_what_is_read_and_lies_where_numbers_may(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    total = write_tensors(path, MADE.items(), [*MADE])
    assert total == sum(tensor.nbytes for tensor in MADE.values())
    found = load_file(path)
    assert found.keys() == MADE.keys()
    for name, tensor in MADE.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    entries = read_entries(tmp_path)  # which refuses holes and overlaps
    assert entries.keys() == MADE.keys()
    assert all(one.start % MADE[name].element_size() == 0 for name, one in entries.items())


def test_a_tensor_is_let_go_before_the_next_one_is_made(tmp_path: Path) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(4):
            assert not any(one() is not None for one in seen)
            made = [torch.full((8 - number,), float(number))]  # one of an odd size waits as bytes
            seen.append(weakref.ref(made[0]))
            yield str(number), made.pop()

    write_tensors(tmp_path / "model.safetensors", tensors(), list("0123"))
    assert load_file(tmp_path / "model.safetensors")["3"].tolist() == [3] * 5
