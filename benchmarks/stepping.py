"""What benchmarks that step a model share: a side's model, its batches, waits and peaks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TINY = Path(__file__).resolve().parent.parent / "qlora_kit" / "assets" / "tiny"


def make(side: str, directory: Path, bits: int, level: str, rank: int, device: str) -> Any:
    """One side's model with its optimizer."""
    peer = importlib.import_module(f"peers.{side}").Peer
    return peer(directory, bits, level, rank, device)


def batches(directory: Path, batch: int, length: int, count: int) -> list[Tensor]:
    """Random ids, the same for every side."""
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (batch, length), generator=drawn) for _ in range(count)]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak(device: str) -> int:
    """Peak bytes since the start or `reset_peak`: of the allocator, or the resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_peak(device: str) -> None:
    """Begin to look for a peak again."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
