"""Laws of the measured bytes: each component against a count of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

import psutil
import pytest
import torch
from allocations import profiled_peak
from families import VOCABULARY, save_checkpoint

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.found import describe_device, peak_bytes
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import StorageCounter, adapter_bytes, optimizer_bytes, weight_bytes
from qlora_kit.training.optimizer import make_optimizer

LINEAR_ELEMENTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
OTHER_ELEMENTS = 2 * VOCABULARY * 64 + 5 * 64


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("measure") / "base"
    save_checkpoint(directory, "mistral", intermediate_size=192)
    return str(directory)


def test_weights_by_bits(base_dir):
    sizes = {}
    for bits in (16, 8, 4):
        model = load_base(base_dir, bits=bits, dtype="bf16", double_quant=None).model
        sizes[bits] = weight_bytes(model)
        assert sizes[bits]["weights"] == (
            sizes[bits]["weights_quantized"] + sizes[bits]["weights_other"]
        )
    assert sizes[16]["weights_quantized"] == 0
    rotary = 2 * 4 * 8  # fp32 frequencies of half a head's width, which the model holds twice
    assert sizes[16]["weights"] == 2 * (LINEAR_ELEMENTS + OTHER_ELEMENTS) + rotary
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 192 + 64)
    assert sizes[8]["weights_quantized"] == LINEAR_ELEMENTS + 4 * rows
    assert sizes[8]["weights_other"] == 2 * OTHER_ELEMENTS + rotary
    table = 4 * 256  # of double quant, one for all layers
    assert sizes[4]["weights_other"] == sizes[8]["weights_other"] + table
    # Half a byte, a byte of scale for 64 values, and the scales of the scales.
    packed = LINEAR_ELEMENTS // 2 + LINEAR_ELEMENTS // 64
    assert packed < sizes[4]["weights_quantized"] < packed * 1.02 + 14 * 8


def test_adapters_gradients_and_states(base_dir):
    model = load_base(base_dir, bits=4).model
    before = weight_bytes(model)
    inject_lora(model, LoRAConfig(r=8))
    assert weight_bytes(model) == before
    elements = 2 * 8 * ((64 + 64) + (64 + 32))
    assert adapter_bytes(model) == {"adapters": 4 * elements, "gradients": 0}
    optimizer = make_optimizer("adamw", model.parameters(), 1e-3)
    assert optimizer_bytes(optimizer) == {"optimizer": 0, "paged": 0}
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.float().square().mean().backward()
    assert adapter_bytes(model)["gradients"] == 4 * elements
    optimizer.step()
    # Two moments in fp32, and a counter of 4 bytes for each of the 8 matrices.
    assert optimizer_bytes(optimizer) == {"optimizer": 8 * elements + 4 * 8, "paged": 0}


def test_the_peak_on_the_cpu_is_the_kernels():
    cpu = torch.device("cpu")
    # psutil reads the resident set elsewhere, and the peak is never below what it was.
    resident = psutil.Process().memory_info().rss
    before = peak_bytes(cpu)
    assert before >= resident
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    grown = before - resident + 64 * 1024**2
    held = torch.ones(grown, dtype=torch.uint8)
    assert peak_bytes(cpu) >= before + 60 * 1024**2
    assert int(held[-1]) == 1
    assert describe_device(cpu).startswith("cpu ")


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    held = b"1" * (600 * 1024**2)
    code = (
        "import torch; from qlora_kit.device.found import peak_bytes; "
        "print(peak_bytes(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held)


def test_a_counter_sees_every_storage_come_and_go():
    model = torch.nn.Linear(8, 4, bias=False)
    x = torch.ones(16, 8)
    with StorageCounter(model) as counter:
        assert counter.before == counter.current == 4 * 8 * 4
        y = model(x)
        known = counter.before + 16 * 8 * 4
        assert counter.current == known + 16 * 4 * 4
        view = y.t()[1:]
        assert counter.current == known + 16 * 4 * 4
        large = torch.zeros(1000)
        del large, y
        assert counter.current == known + 16 * 4 * 4
        del view
        assert counter.current == known
    assert counter.peak == known + 16 * 4 * 4 + 4000


def test_a_counter_agrees_with_the_profilers_allocations():
    """The growth of a step, within 2 % or 1 MiB of torch's allocation events."""
    layers = [torch.nn.Linear(512, 512) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    x = torch.ones(1024, 512)
    with StorageCounter(model) as counter:
        model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    peak = profiled_peak(lambda: model(x).sum().backward())
    ours = counter.peak - counter.before - x.numel() * 4
    assert abs(ours - peak) <= max(0.02 * peak, 2**20)
