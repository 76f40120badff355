"""Laws of how tensors of files reach a device, tried with a slow one in place of a card."""

from __future__ import annotations

import math

import bitsandbytes  # noqa: F401  (its operations)
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.base import encode_weight, tensors
from qlora_kit.base.encode_weight import encode_blocks, encode_rows
from qlora_kit.base.safetensors_file import read_entries
from qlora_kit.base.tensors import CPU, FINITE, NumberChecks, Reader, read_tensors
from qlora_kit.device.host_buffers import HostBuffers
from qlora_kit.errors import NumericError


class SlowDevice:
    """Copies that are queued and made as late as somebody waits for them."""

    def __init__(self):
        self.arrived = torch.zeros(0, dtype=torch.uint8)
        self.queued = []
        self.most_queued = 0

    def send(self, piece):
        self.queued.append(piece)
        self.most_queued = max(self.most_queued, len(self.queued))

    def recorded(self):
        number = len(self.arrived) + len(self.queued)

        def wait():
            while len(self.arrived) < number:
                self.arrived = torch.cat((self.arrived, self.queued.pop(0)))

        return wait


@pytest.mark.parametrize("waits", [True, False])
def test_a_piece_is_not_filled_again_before_its_copy_has_arrived(waits):
    """And while one is on its way the other one is filled; who does not wait loses bytes."""
    device = SlowDevice()
    buffers = HostBuffers(1, CPU, device.recorded if waits else lambda: lambda: None)
    for number in range(9):
        piece = buffers.take()
        piece.fill_(number)
        device.send(piece)
        buffers.sent()
    device.recorded()()
    assert (device.arrived.tolist() == list(range(9))) == waits
    assert device.most_queued == (2 if waits else 9)


@pytest.fixture
def directory(tmp_path):
    generator = torch.Generator().manual_seed(5)
    made = {
        "a": torch.randn(37, 11, generator=generator),
        "b": torch.randn(70, 33, generator=generator).bfloat16(),
        "c": torch.tensor(3.0),
        "d": torch.zeros(0, 4),
        "e": torch.arange(50),
    }
    save_file(made, tmp_path / "model.safetensors")
    return tmp_path, made


def test_in_pieces_or_whole_a_tensor_has_the_same_bytes(directory, monkeypatch):
    """In memory of its own, or in the buffer, directly or through the host's two pieces."""
    folder, made = directory
    entries = read_entries(folder)
    monkeypatch.setattr(tensors, "PIECE", 1000)
    kept = dict.fromkeys(("a", "b", "c", "d"), torch.float16)
    found = dict(read_tensors(entries, kept=kept))  # what is kept stays valid
    for name in kept:
        assert torch.equal(found[name], made[name].half()), name
    for name, tensor in read_tensors(entries, kept={"a": torch.float32}):
        assert torch.equal(tensor, made[name]), name
    with Reader() as read:
        for nbytes in (1, 7, 1000, 10**6):
            through = tensors._through_the_host(read, nbytes, CPU)
            for name, tensor in read_tensors({"b": entries["b"], "c": entries["c"]}, through):
                assert torch.equal(tensor, made[name]), (name, nbytes)


class Reads(TorchDispatchMode):
    """Counts the values that the host asks for, one by one or in a list."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def refusal(name):
    return lambda largest: NumericError(f"{name} has {largest:g}", "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 600.0, -600.0])
def test_the_first_tensor_beyond_its_limit_is_named_where_all_are_read(dtype, bad):
    """However it has changed since; until then nothing is read."""
    checks, values = NumberChecks(), torch.ones(5, 3, dtype=dtype)
    checks.add(values, 500.0, refusal("good"))
    values[2, 1] = bad
    with Reads() as reads:
        checks.add(values, FINITE, refusal("any size"))
        checks.add(values, 500.0, refusal("small"))
        values.zero_()
        checks.add(values, 500.0, refusal("zeros"))
    assert reads.count == 0
    with pytest.raises(NumericError, match="small has 600" if abs(bad) == 600 else "any size"):
        checks.read()


def test_files_that_are_not_finite_are_refused_where_the_checks_are_read(tmp_path):
    weight = torch.ones(4, 64)
    weight[1, 1] = torch.nan
    save_file({"w": weight, "v": torch.ones(3)}, tmp_path / "model.safetensors")
    entries, checks = read_entries(tmp_path), NumberChecks()
    with pytest.raises(NumericError, match=r"model\.safetensors: w holds 1 values that are not"):
        list(read_tensors(entries))
    assert len(list(read_tensors(entries, kept={"v": torch.float16}, checks=checks))) == 2
    with pytest.raises(NumericError, match=r"model\.safetensors: w holds values that are not fin"):
        checks.read()
    # Finite in the files, and not in the dtype that it is kept in.
    save_file({"w": torch.full((3,), 1e30)}, tmp_path / "model.safetensors")
    with pytest.raises(NumericError, match="w in fp16 holds 3 values"):
        list(read_tensors(read_entries(tmp_path), kept={"w": torch.float16}))


@pytest.mark.parametrize("numel", [64, 1000, 64 * 33])
def test_encoding_whole_or_in_parts_gives_the_same_bytes(monkeypatch, numel):
    """The part of a card is the whole tensor."""
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    whole = *encode_blocks(flat, "nf4"), *encode_rows(flat.view(-1, 8))
    monkeypatch.setattr(encode_weight, "ENCODED_AT_ONCE", 128)
    parts = *encode_blocks(flat, "nf4"), *encode_rows(flat.view(-1, 8))
    for one, other in zip(whole, parts, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)
