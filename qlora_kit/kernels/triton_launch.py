"""The launches of all Triton kernels by the names of their operations. It imports Triton."""

from __future__ import annotations

from collections.abc import Callable

from qlora_kit.kernels.triton_dequantize import launch_decode
from qlora_kit.kernels.triton_rmsnorm import launch_again, launch_backward, launch_normalize
from qlora_kit.kernels.triton_rotary import launch_rotate
from qlora_kit.kernels.triton_swiglu import launch_gate, launch_gate_backward

LAUNCHES: dict[str, Callable[..., None]] = {
    "triton_dequantize": launch_decode,
    "triton_normalize": launch_normalize,
    "triton_normalize_again": launch_again,
    "triton_normalize_backward": launch_backward,
    "triton_rotate": launch_rotate,
    "triton_gate": launch_gate,
    "triton_gate_backward": launch_gate_backward,
}
