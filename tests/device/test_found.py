"""Laws of finding a device: what is allowed, what is refused, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.config.base import BaseConfig
from qlora_kit.device import target
from qlora_kit.device.found import device_notes, find_device, prefer_flash
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
