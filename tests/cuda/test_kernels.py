"""The Triton kernels on a card, by the cases that the interpreter computes without one."""

from __future__ import annotations

import device_laws as laws
import pytest
import torch
from kernel_parity import check_operations, parity

from qlora_kit.kernels.triton_ops import allow_triton, uses_triton


def test_a_card_computes_what_torch_computes() -> None:
    if not uses_triton(torch.ones(1, 16, device="cuda", dtype=torch.float16)):
        pytest.skip("no Triton kernels here")
    major, _ = torch.cuda.get_device_capability()
    cases = [case for case in parity("cuda") if major >= 8 or "bfloat16" not in case.case]
    assert len(cases) > 150
    assert [case for case in cases if not case.error <= case.limit] == []


def test_each_operation_writes_what_its_schema_says() -> None:
    check_operations("cuda")


@pytest.mark.parametrize(("family", "bits"), [("llama3", 4), ("gemma2", 4), ("phi3", 8)])
def test_a_step_without_triton_has_the_same_numbers(family: str, bits: int) -> None:
    model = laws.trains(family, bits, torch.float32, "cuda")
    found = laws.results_of(model, laws.alone())
    allow_triton(False)
    try:
        expected = laws.results_of(model, laws.alone())
    finally:
        allow_triton(True)
    error, tensor = laws.worst(found, expected)
    assert error <= laws.STEP_TOLERANCE["cuda"], tensor
