"""Laws of finding a device: what is allowed, what is refused, and what is said of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from qlora_kit.config.base import BaseConfig
from qlora_kit.device import target
from qlora_kit.device.found import device_notes, dtype_notes, find_device, prefer_flash
from qlora_kit.errors import ConfigError, ResourceError

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["xpu", "mps", "xpu:1", "hpu", "rocm"])
def test_other_accelerators_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="no other accelerator is supported") as caught:
        BaseConfig(device=name)
    assert name in caught.value.problem
    assert "auto, cpu, cuda or cuda:N" in str(caught.value)


@pytest.mark.parametrize("name", ["xpu", "mps", "meta"])
def test_no_other_device_comes_in_by_another_way(name: str) -> None:
    with pytest.raises(ResourceError, match=f"--device {name}: cpu, cuda are what") as caught:
        find_device(name)
    assert "use --device cpu" in caught.value.remedy


def test_a_card_of_amd_is_cuda_with_a_note_and_plain_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch says `cuda` there, and numbers of a capability that mean something else."""
    assert device_notes(CUDA) == device_notes(torch.device("cpu")) == ()
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    (note,) = device_notes(CUDA)
    assert "ROCm 6.4.43482" in note
    assert device_notes(torch.device("cpu")) == ()
    assert target._of_the_card(CUDA) == target.PLAINEST < (8, 0)


def test_a_dtype_without_instructions_is_said_to_be_multiplied_in_fp32() -> None:
    cpu = torch.device("cpu")
    with target.processor_with(torch.bfloat16):
        assert dtype_notes(torch.bfloat16, cpu) == dtype_notes(torch.float32, cpu) == ()
    with target.processor_with():
        (note,) = dtype_notes(torch.bfloat16, cpu)
        assert "no instructions for bf16" in note
        assert "in fp32" in note
        assert dtype_notes(torch.float32, cpu) == dtype_notes(torch.bfloat16, CUDA) == ()


def test_where_torch_is_kept_from_avx512_nothing_is_multiplied_in_16_bits() -> None:
    """Its products of bf16 take 25 to 200 times as long there, and the processor still has them."""
    code = "from qlora_kit.device.target import NATIVE; print(*NATIVE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    if platform.machine() in ("x86_64", "AMD64"):
        assert not done.stdout.strip()


def test_attention_on_a_card_is_not_cudnns() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        prefer_flash(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        prefer_flash(CUDA)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
