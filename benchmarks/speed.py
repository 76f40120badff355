"""Speed and memory of a training step: ours against PEFT, by bits and recompute level.

Each side has a process of its own and steps when it is its turn, so that other work on the machine
falls on all sides and none lives in the heap of another. On CUDA, where not all of them have room
beside each other, one side takes all its turns and ends before the next one begins. A process gives
the seconds of its steps, its peak memory over loading (with what transformers allocates for a
moment to warm the allocator) and over the steps, the counted bytes of one more step, and where the
time of a last one goes. Ratios of speed are medians over the rounds, of bytes of the peaks. They
are to PEFT as its guide says, which recomputes everything (`prepare_model_for_kbit_training` turns
checkpointing on), and at each recompute level to PEFT as its guide says and at its best.

The floor is the time of the products alone: the seven linears of every layer and the head, forward
and by the input, best of 8, in the same run, in the dtype that all sides compute in: bf16, or fp32
on a processor that does not multiply it. `most` is PEFT's step over the floor, with
full recompute over the floor and the products that ours makes again: the ratio of a step that did
nothing else. Results are written after each setting.

    python benchmarks/speed.py                      # the 1b shape, 1 x 512, all settings
    python benchmarks/speed.py --bits 4 --steps 10
    python benchmarks/speed.py --bits 4 --avx2 --result speed_avx2    # 20 min

`--avx2` keeps torch, oneDNN and MKL to AVX2, as on a processor without more: all sides and the
floor are in fp32 then. The library of bitsandbytes cannot be told; where the processor has AVX512
its decoding of weights uses it, on every side.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from step_floor import products_floor
from step_profile import profiled
from stepping import TINY, batches, make, peak, reset_peak, wait

from qlora_kit.memory.counter import StorageCounter

SIDES = ("ours", "peft_guide", "peft_best")
LEVELS = ("none", "full")
GUIDE = "peft_guide, full"
FLOORS = 8
WARM_UP = 2
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""What the libraries read when they are loaded."""


class Side:
    """A peer at a recompute level, stepping in a process of its own."""

    def __init__(self, name: str, level: str, directory: Path, bits: int, given: Any) -> None:
        command = [
            sys.executable,
            __file__,
            *("--side", name, "--directory", str(directory), "--bits", str(bits)),
            *("--level", level, "--batch", str(given.batch), "--length", str(given.length)),
            *("--rank", str(given.rank), "--device", given.device, "--steps", str(given.steps)),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self.found: dict[str, Any] = self.ask("load")
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def ask(self, what: str) -> dict[str, Any]:
        """Let the process do `what` (`load`, `step` or `end`); what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(answer)  # type: ignore[no-any-return]

    def step(self) -> None:
        """One optimizer step."""
        answer = self.ask("step")
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])

    def end(self) -> None:
        """The process measures what is left, and ends."""
        self.found |= self.ask("end")
        self._process.wait()

    def described(self, tokens: int, floor_s: float) -> dict[str, Any]:
        """All that was found of this side."""
        taken = statistics.median(self.seconds[WARM_UP:])
        return {
            "step_s": taken,
            "steps_s": self.seconds[WARM_UP:],
            "tokens_per_s": tokens / taken,
            "share_of_floor": floor_s / taken,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            **self.found,
        }

    def over(self, other: Side) -> float:
        """How many times as fast as another side: the median over the rounds."""
        rounds = zip(self.seconds[WARM_UP:], other.seconds[WARM_UP:], strict=True)
        return statistics.median(theirs / ours for ours, theirs in rounds)


def serve(given: argparse.Namespace) -> None:
    """What a process of a `Side` does: answer the lines of its standard input with JSON."""
    (bits,), (level,) = given.bits, given.level
    data = iter(batches(given.directory, given.batch, given.length, given.steps + WARM_UP + 2))
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line == "load\n":
            answer["imports_bytes"] = peak(given.device)
            peer = make(given.side, given.directory, bits, level, given.rank, given.device)
            wait(given.device)
            answer["loading_bytes"] = peak(given.device)
            reset_peak(given.device)
        elif line == "step\n":
            began = time.perf_counter()
            loss = peer.step(next(data))
            wait(given.device)
            answer = {"seconds": time.perf_counter() - began, "loss": float(loss)}
        else:
            answer["steps_bytes"] = peak(given.device)
            counter = StorageCounter(peer.model)
            with counter:
                peer.step(next(data))
            answer |= {"counted_bytes": counter.peak, "counted_before_bytes": counter.before}
            profile = profiled(functools.partial(peer.step, next(data)), given.device)
            answer |= {"profile_s": profile.pop("by_name"), **profile}
        print(json.dumps(answer), flush=True)
        if line == "end\n":
            return


def measure(directory: Path, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    """Every side at every level in some bits, in turns."""
    asked = [(name, level) for level in given.level for name in SIDES]
    tokens, steps = given.batch * given.length, given.steps + WARM_UP
    sides: dict[str, Side] = {}
    floors: dict[str, list[float]] = {level: [] for level in LEVELS}
    config = json.loads((directory / "config.json").read_text())
    floor = products_floor(config, tokens, given.device)
    # Resident sides take turns; else one after another takes all of its own.
    resident = not given.device.startswith("cuda")
    together = [asked] if resident else [[one] for one in asked]
    for group in together:
        turns = {
            f"{name}, {level}": Side(name, level, directory, bits, given) for name, level in group
        }
        sides |= turns
        for number in range(max(steps, FLOORS)):
            if number < steps:
                order = list(turns.values())
                first = number % len(order)  # none is always the first
                for side in order[first:] + order[:first]:
                    side.step()
            if number < FLOORS and len(floors[LEVELS[0]]) < FLOORS:
                for level, taken in floors.items():
                    taken.append(floor(level))
        for side in turns.values():
            side.end()
    least = {level: min(taken) for level, taken in floors.items()}
    found: dict[str, Any] = {"floor_s": least["none"], "floor_full_s": least["full"]}
    found |= {name: side.described(tokens, least["none"]) for name, side in sides.items()}
    found["ratios"] = ratios(found, sides, given.level)
    if GUIDE in found:
        found["most"] = {level: found[GUIDE]["step_s"] / least[level] for level in given.level}
    return found


def between_bits(results: dict[str, Any], levels: Sequence[str]) -> dict[str, float]:
    """Our quantized steps over our own in 16 bits; seconds each against the floor of its run."""
    plain, result = results["16 bits"], {}
    for bits, level in itertools.product((4, 8), levels):
        if (found := results.get(f"{bits} bits")) is None:
            continue
        quantized, other = (one[f"ours, {level}"] for one in (found, plain))
        at = f"ours, {level}, {bits} bits / 16 bits"
        result[f"step_s: {at}"] = other["share_of_floor"] / quantized["share_of_floor"]
        result[f"counted_bytes: {at}"] = quantized["counted_bytes"] / other["counted_bytes"]
    return result


def ratios(
    found: dict[str, Any], sides: dict[str, Side], levels: Sequence[str]
) -> dict[str, float]:
    """Ours over PEFT, tokens a second and bytes: its guide's way, and level by level."""
    pairs = [(f"ours, {level}", GUIDE) for level in levels]
    for level in levels:
        pairs += [(f"ours, {level}", f"{side}, {level}") for side in SIDES[1:]]
    result = {}
    for ours, peer in dict.fromkeys(pairs):
        if peer not in found:
            continue
        result[f"tokens_per_s: {ours} / {peer}"] = sides[ours].over(sides[peer])
        for figure in ("loading_bytes", "steps_bytes", "counted_bytes"):
            result[f"{figure}: {ours} / {peer}"] = found[ours][figure] / found[peer][figure]
    return result


def main() -> None:
    parser = make_parser(__doc__, "speed")
    data = os.environ.get("QLORA_KIT_DATA", "")
    shape = Path(data) / "configs/tinyllama_1b_chat_v1.0.json"
    parser.add_argument("--shape", type=Path, default=shape, help="a config.json")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--level", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="of a checkpoint that is there already")
    parser.add_argument("--avx2", action="store_true", help="as on a processor with AVX2 alone")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        serve(given)
        return
    if given.avx2 and any(os.environ.get(name) != value for name, value in AVX2.items()):
        # Torch is loaded already, and the sides inherit what is set here.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    results: dict[str, Any] = {"shape": given.shape.stem}
    results |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    results |= {"batch": given.batch, "length": given.length, "rank": given.rank}
    with tempfile.TemporaryDirectory() as folder:
        directory = given.directory or Path(folder) / "base"
        if given.directory is None:
            make_checkpoint(given.shape, directory)
            copy_tokenizer(TINY, directory)
        for bits in given.bits:
            found = results[f"{bits} bits"] = measure(directory, bits, given)
            print(bits, json.dumps(found["ratios"], indent=1), flush=True)
            if "16 bits" in results:
                results["between bits"] = between_bits(results, given.level)
            path = write_result(given, results, "" if given.device == "cpu" else "cuda")
    print(path)


if __name__ == "__main__":
    main()
