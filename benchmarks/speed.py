"""Speed and memory of a training step: ours against PEFT, by bits and recompute level.

Tokens a second come from steps in turn in one process, so that other work on the machine falls on
all sides. Peak memory over loading and over the steps comes from a process for each side. The floor
is the time of the products alone: the seven linears of every layer and the head, forward and by
the input, in bf16, best of 8, in the same run. Results are written after each setting.

    python benchmarks/speed.py                      # the 1b shape, 1 x 512, all settings
    python benchmarks/speed.py --bits 4 --level none --steps 10
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import write_result
from torch import Tensor

from qlora_kit.memory.counter import StorageCounter

SIDES = ("ours", "peft_guide", "peft_best")
TINY = Path(__file__).resolve().parent.parent / "qlora_kit" / "assets" / "tiny"
WARM_UP = 2


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


def seconds_of_steps(
    directory: Path, bits: int, level: str, given: argparse.Namespace
) -> dict[str, Any]:
    """Median seconds of each side's steps, in turn, and the first and last loss."""
    sides = {side: make(side, directory, bits, level, given.rank, given.device) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    data = batches(directory, given.batch, given.length, given.steps + WARM_UP)
    floors = []
    for number, ids in enumerate(data):
        for side, peer in sides.items():
            began = time.perf_counter()
            loss = peer.step(ids)
            wait(given.device)
            taken = time.perf_counter() - began
            losses[side].append(float(loss))
            if number >= WARM_UP:
                seconds[side].append(taken)
        if number < 8:
            floors.append(floor(directory, given))
    tokens, best = given.batch * given.length, min(floors)
    return {
        "floor_s": best,
        **{
            side: {
                "step_s": statistics.median(taken),
                "tokens_per_s": tokens / statistics.median(taken),
                "share_of_floor": best / statistics.median(taken),
                "first_loss": losses[side][0],
                "last_loss": losses[side][-1],
            }
            for side, taken in seconds.items()
        },
    }


def floor(directory: Path, given: argparse.Namespace) -> float:
    """Seconds of a step's products by frozen weights, and nothing else."""
    config = json.loads((directory / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = hidden * config.get("num_key_value_heads", heads) // heads
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    made = {shape: _random(shape[::-1], given.device) for shape in {*shapes}}
    head = _random((config["vocab_size"], hidden), given.device)
    tokens = given.batch * given.length
    inputs = {size: _random((tokens, size), given.device) for size in {hidden, kv, ffn}}
    layers = shapes * config["num_hidden_layers"]
    wait(given.device)
    began = time.perf_counter()
    for shape in layers:
        F.linear(inputs[shape[0]], made[shape])
    logits = F.linear(inputs[hidden], head)
    logits @ head
    for shape in layers:
        inputs[shape[1]] @ made[shape]
    wait(given.device)
    return time.perf_counter() - began


def _random(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.full(shape, 0.5, device=device, dtype=torch.bfloat16)


def memory_of(
    side: str, directory: Path, bits: int, level: str, given: argparse.Namespace
) -> dict[str, float]:
    """Peak bytes over loading and over the steps of one side, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *("--side", side, "--directory", str(directory), "--bits", str(bits), "--level", level),
        *("--batch", str(given.batch), "--length", str(given.length), "--rank", str(given.rank)),
        *("--device", given.device),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(given: argparse.Namespace, bits: int, level: str) -> dict[str, float]:
    """What `memory_of` asks its process for."""
    before = peak(given.device)
    peer = make(given.side, given.directory, bits, level, given.rank, given.device)
    wait(given.device)
    found: dict[str, float] = {"imports_bytes": before, "loading_bytes": peak(given.device)}
    reset_peak(given.device)
    data = batches(given.directory, given.batch, given.length, 4)
    for ids in data[:3]:
        peer.step(ids)
    wait(given.device)
    found["steps_bytes"] = peak(given.device)
    counter = StorageCounter(peer.model)
    with counter:
        peer.step(data[3])
    found["counted_bytes"] = counter.peak
    found["counted_before_bytes"] = counter.before
    return found


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


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Ours over each peer: tokens a second, and bytes."""
    result = {}
    for peer in SIDES[1:]:
        result[f"tokens_per_s_over_{peer}"] = (
            found["ours"]["tokens_per_s"] / found[peer]["tokens_per_s"]
        )
        for phase in ("loading_bytes", "steps_bytes", "counted_bytes"):
            result[f"{phase}_over_{peer}"] = found["ours"][phase] / found[peer][phase]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = os.environ.get("QLORA_KIT_DATA", "")
    shape = Path(data) / "configs/tinyllama_1b_chat_v1.0.json"
    parser.add_argument("--shape", type=Path, default=shape, help="a config.json")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--level", nargs="+", default=["none", "full"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--result", default=None, help="name of the result; default: by device")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure_memory(given, given.bits[0], given.level[0])))
        return
    name = given.result or ("speed" if given.device == "cpu" else "speed_cuda")
    results: dict[str, Any] = {"shape": given.shape.stem}
    results |= {"batch": given.batch, "length": given.length, "rank": given.rank}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        make_checkpoint(given.shape, directory)
        copy_tokenizer(TINY, directory)
        for bits, level in itertools.product(given.bits, given.level):
            found = seconds_of_steps(directory, bits, level, given)
            for side in SIDES:
                found[side] |= memory_of(side, directory, bits, level, given)
            found["ratios"] = ratios(found)
            results[f"{bits} bits, {level}"] = found
            print(bits, level, json.dumps(found, indent=1), flush=True)
            path = write_result(name, results)
    print(path)


if __name__ == "__main__":
    main()
