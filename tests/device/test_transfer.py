"""Tensors to the host and back: nothing is read before it is there, or written over before it left.

With copies that are made as late as they may (`tests/support/late_copies.py`) as with plain ones.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter, deque

import pytest
import torch
from late_copies import Late
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.device import transfer
from qlora_kit.device.target import heard_kernels, planned_device
from qlora_kit.device.transfer import PIECE, Transfers, around_host, host_memory

CPU = torch.device("cpu")


@pytest.fixture(params=["plain", "late"])
def transfers(request):
    return Transfers(CPU, Late() if request.param == "late" else None)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3,), (), (0, 4)])
def test_what_comes_back_is_what_went_out(shape, dtype, transfers):
    tensor = numbers(*shape, dtype=dtype)
    back = transfers.back(transfers.out(tensor))
    assert torch.equal(back, tensor)
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    assert not tensor.numel() or back.data_ptr() != tensor.data_ptr()


def test_gaps_are_no_part_of_it(transfers):
    tensor = numbers(6, 8).t()[::2]
    back = transfers.back(transfers.out(tensor))
    assert torch.equal(back, tensor)
    assert back.is_contiguous()


def test_dimensions_lie_as_they_lay(transfers):
    """Attention gives heads before tokens, in memory the other way round."""
    tensor = numbers(2, 5, 3, 4).transpose(1, 2)
    back = transfers.back(transfers.out(tensor))
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_many_go_and_come_back_in_the_opposite_order(transfers):
    tensors = [numbers(4, 3, seed=seed) for seed in range(6)]
    held = [transfers.out(tensor.clone()) for tensor in tensors]
    for tensor, before, one in reversed(list(zip(tensors, [None, *held], held, strict=False))):
        back = transfers.back(one)
        if before is not None:
            transfers.prefetch(before)
        assert torch.equal(back, tensor)


def test_what_leaves_is_held_until_it_is_there():
    copies = Late()
    transfers = Transfers(CPU, copies)
    tensors = [numbers(4, seed=seed) for seed in range(3)]
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    held = []
    for place in range(3):
        transfers.settle()
        held.append(transfers.out(tensors[place]))
        tensors[place] = None
        assert [one() is not None for one in memory[: place + 1]] == [False] * place + [True]
        assert copies.made == place  # the one before this is there, this one is on its way
    transfers.settle()
    assert (memory[2](), copies.made) == (None, 3)


def test_what_comes_already_does_not_end_with_what_leaves():
    transfers = Transfers(CPU, Late())
    held = transfers.out(numbers(4))
    transfers.prefetch(held)
    transfers.settle()
    assert held.is_coming
    assert torch.equal(transfers.back(held), numbers(4))


@pytest.mark.parametrize("fetched", [False, True])
def test_what_is_given_up_on_its_way_has_arrived_when_its_memory_is_free(fetched):
    copies = Late()
    transfers = Transfers(CPU, copies)
    held = transfers.out(numbers(4))
    if fetched:
        transfers.prefetch(held)
    moved = weakref.ref(held.on_device.untyped_storage())
    seen = []
    weakref.finalize(held.on_device.untyped_storage(), lambda: seen.append(copies.waiting.copy()))
    del held
    gc.collect()
    assert moved() is None
    assert seen == [deque()]


def test_a_copy_is_asked_for_once():
    copies = Late()
    transfers = Transfers(CPU, copies)
    held = transfers.out(numbers(4))
    transfers.settle()
    for _ in range(2):
        transfers.prefetch(held)
    assert len(copies.waiting) == 1
    assert torch.equal(transfers.back(held), numbers(4))
    assert copies.follows == 2
    assert torch.equal(transfers.back(held), numbers(4))  # once more, from the host
    assert copies.follows == 3


def test_pieces_of_host_memory_are_used_again_for_any_size(monkeypatch):
    """As on CUDA, where memory is page-locked: the pieces of what is gone are the next ones."""
    made = []

    def memory(nbytes):
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(transfer, "host_memory", memory)
    monkeypatch.setattr(transfer, "PIECE", 64)
    monkeypatch.setattr(transfer, "has_own_memory", lambda device: True)
    transfers = Transfers(CPU, Late())
    for length in (40, 12, 33):
        tensors = [numbers(length, seed=seed) for seed in range(4)]
        held = [transfers.out(tensor) for tensor in tensors]
        for tensor, one in zip(tensors[::-1], held[::-1], strict=True):
            assert torch.equal(transfers.back(one), tensor)
        del one, held
    assert made == [64] * 4 * 3  # 40 numbers are 160 bytes, in three pieces


def test_without_page_locked_memory_it_is_ordinary_memory_and_that_is_said(monkeypatch):
    """A torch without CUDA has none, and says so as a card does where there is no room."""
    monkeypatch.setattr(transfer, "_UNLOCKED", [])
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.warns(UserWarning, match="no page-locked memory for 128 bytes more"):
        assert host_memory(128).shape == (128,)
    assert host_memory(64).shape == (64,)  # once is enough


class Made(TorchDispatchMode):
    """The bytes of what operations make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes.append(result.nbytes)
        return result


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_counts_the_hosts_memory_and_hears_of_the_bytes(device):
    heard, taken = Counter(), []

    def listener(kernel, reads, writes):
        heard[kernel] += sum(one.nbytes for one in (*reads, *writes))

    @contextlib.contextmanager
    def around():
        with Made() as made:
            yield
        taken.extend(made.sizes)

    with FakeTensorMode(), planned_device(device), heard_kernels(listener), around_host(around):
        transfers = Transfers(CPU)
        held = transfers.out(torch.empty(3, 1000, dtype=torch.bfloat16))
        transfers.prefetch(held)
        back = transfers.back(held)
    assert (back.shape, back.dtype) == ((3, 1000), torch.bfloat16)
    assert heard == {"to_host": 6000, "to_device": 6000}
    assert taken == [PIECE if device == "cuda" else 6000]
