"""Laws of the workspace: who counts memory is told of it, whatever thread it is made in."""

from __future__ import annotations

from threading import Thread

import torch

from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.quantize import Quantization
from qlora_kit.kernels.workspace import own_workspace, tagged_workspace, workspace


def in_a_thread(run):
    thread = Thread(target=run)
    thread.start()
    thread.join()


def test_a_backward_in_another_thread_is_told_to_who_counts():
    """As autograd runs it on CUDA. Meta tensors stand for a device that has an allocator."""
    weight, told = torch.randn(48, 64), []
    layer = quantize_linear(weight, None, Quantization(8)).to("meta")
    x = torch.empty(2, 64, device="meta", dtype=torch.bfloat16).requires_grad_()

    def tag(component, tensors):
        told.extend((component, tensor.numel()) for tensor in tensors)

    with own_workspace({}), tagged_workspace(tag):
        y = layer(x)
        assert told == [("workspace", weight.numel())]
        in_a_thread(lambda: y.sum().backward())
        assert x.grad.shape == x.shape
        assert told == 2 * [("workspace", weight.numel())]
    in_a_thread(lambda: layer(x))
    assert len(told) == 2


def test_who_counts_in_a_thread_of_its_own_is_told_of_its_own():
    told = {"here": 0, "there": 0}

    def count(name):
        def tag(component, tensors):
            told[name] += sum(tensor.numel() for tensor in tensors)

        return tag

    like = torch.empty(0, device="meta")

    def there():
        with own_workspace({}), tagged_workspace(count("there")):
            workspace(64, torch.float32, like)
            in_a_thread(lambda: workspace(8, torch.float32, like))

    with own_workspace({}), tagged_workspace(count("here")):
        in_a_thread(there)
        assert told == {"here": 0, "there": 72}
        workspace(64, torch.float32, like)
        # On the CPU backward runs in the thread that calls it: nothing of another is told.
        in_a_thread(lambda: workspace(64, torch.float32, torch.empty(0)))
    assert told == {"here": 64, "there": 72}
