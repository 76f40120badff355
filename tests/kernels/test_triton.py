"""Laws of the Triton kernels without a card: torch's numbers, and machine code that spills nothing.

On a card: `tests/cuda/test_kernels.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit.base.quantize import code_tables
from qlora_kit.device.target import planned_device
from qlora_kit.kernels import triton_ops
from qlora_kit.kernels.triton_ops import allow_triton, uses_triton
from qlora_kit.memory.counter import StorageCounter

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    *("dequantize", "normalize", "add", "normalize_backward"),
    *("rotate", "gate", "gate_backward", "step"),
)


@pytest.fixture(scope="module")
def interpreted():
    """What Triton's interpreter computes, in a process that begins with it."""
    script = ROOT / "tests" / "support" / "kernel_parity.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_are_those_of_torch(interpreted, kernel):
    cases = [case for case in interpreted if case["kernel"] == kernel]
    assert len(cases) >= 9
    # Not `>`: NaN is no agreement.
    assert [case for case in cases if not case["error"] <= case["limit"]] == []
    assert {case["kernel"] for case in interpreted} == set(KERNELS)


@pytest.fixture(scope="module")
def compiler():
    path = ROOT / "benchmarks" / "compiled_kernels.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_kernels_compile_spill_nothing_and_move_16_bytes_a_thread(compiler, tmp_path, monkeypatch):
    """On one architecture in one dtype; all seven in all dtypes: benchmarks/compiled_kernels.py."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for build in compiler.small_set("bf16"):
        found = compiler.compiled(build, 86)
        assert found.spilled_bytes == 0, build.name
        assert found.widest_load == found.widest_store == 16, build.name


def test_tables_are_those_of_bitsandbytes():
    source = (ROOT / "qlora_kit" / "kernels" / "triton_dequantize.py").read_text()
    values = {abs(float(value)) for name in ("nf4", "fp4") for value in code_tables(name)[0]}
    assert [value for value in values if repr(value) not in source] == []


@pytest.mark.parametrize(
    ("dtype", "card", "used"),
    [
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (7, 5), False),
        (torch.float16, (7, 5), True),
        (torch.float16, (7, 0), False),
        (torch.float64, (9, 0), False),
    ],
)
def test_they_are_used_where_a_card_has_the_dtype_and_nobody_forbids(dtype, card, used):
    x = torch.empty(4, dtype=dtype)
    assert not uses_triton(x)
    with torch._subclasses.FakeTensorMode() as mode, planned_device("cuda", card):
        fake = mode.from_tensor(x)
        assert uses_triton(fake) is used
        allow_triton(False)
        try:
            assert not uses_triton(fake)
        finally:
            allow_triton(True)
    with planned_device("cuda", card):
        assert not uses_triton(x)  # it has values, and they are not on the card


def test_a_plan_makes_what_the_caller_makes():
    """The fake of an operation counts nothing: outputs are its arguments."""
    with torch._subclasses.FakeTensorMode(), planned_device("cuda", (8, 6)):
        gate, up = torch.empty(6, 64).half(), torch.empty(6, 64).half()
        with StorageCounter() as counter:
            counter.tag("given", (gate, up))
            before = counter.current
            triton_ops.torch.ops.qlora_kit.triton_gate.out(
                gate, up, "silu", out=torch.empty_like(gate)
            )
            assert max(i.peak for i in counter.intervals) == before + gate.nbytes
