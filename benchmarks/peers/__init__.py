"""The sides of a comparison, each a module with a `Peer`."""

import torch

from qlora_kit.device.target import is_native


def step_dtype(device: str) -> torch.dtype:
    """What every side computes in: bf16, or fp32 on a processor that does not multiply it."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and not is_native(torch.bfloat16) else torch.bfloat16
