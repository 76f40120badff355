"""Speed and memory of a training step: ours against PEFT, by bits and recompute level.

Each side has a process of its own and steps when it is its turn, so that other work on the machine
falls on all sides and none lives in the heap of another. A process gives the seconds of its steps,
its peak memory over loading and over the steps, the counted bytes of one more step, and where the
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
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import step_dtype
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from torch import Tensor

from qlora_kit.memory.counter import StorageCounter

SIDES = ("ours", "peft_guide", "peft_best")
LEVELS = ("none", "full")
GUIDE = "peft_guide, full"
FLOORS = 8
PROFILED = 20
TINY = Path(__file__).resolve().parent.parent / "qlora_kit" / "assets" / "tiny"
WARM_UP = 2


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

    def end(self, tokens: int, floor_s: float) -> dict[str, Any]:
        """All that was found of this side; the process ends."""
        self.found |= self.ask("end")
        self._process.wait()
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
            answer["profile_s"] = profile(peer, next(data), given.device)
        print(json.dumps(answer), flush=True)
        if line == "end\n":
            return


def profile(peer: Any, ids: Tensor, device: str) -> dict[str, float]:
    """Seconds of a step by operation, its own part; decoding is within ours and bitsandbytes'."""
    kinds = torch.profiler.ProfilerActivity
    cuda = device.startswith("cuda")
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as found:
        peer.step(ids)
        wait(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {event.key: getattr(event, own) / 1e6 for event in found.key_averages()}
    largest = sorted(spent, key=spent.__getitem__, reverse=True)
    rest = sum(spent[name] for name in largest[PROFILED:])
    return {name: spent[name] for name in largest[:PROFILED]} | {"all others": rest}


def make(side: str, directory: Path, bits: int, level: str, rank: int, device: str) -> Any:
    """One side's model with its optimizer."""
    peer = importlib.import_module(f"peers.{side}").Peer
    return peer(directory, bits, level, rank, device)


def measure(directory: Path, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    """Every side at every level in some bits, in turns."""
    sides = {
        f"{name}, {level}": Side(name, level, directory, bits, given)
        for level in given.level
        for name in SIDES
    }
    with floor_products(directory, given) as floor:
        floors: dict[str, list[float]] = {level: [] for level in LEVELS}
        for number in range(max(given.steps + WARM_UP, FLOORS)):
            if number < given.steps + WARM_UP:
                turns = list(sides.values())
                first = number % len(turns)  # none is always the first
                for side in turns[first:] + turns[:first]:
                    side.step()
            if number < FLOORS:
                for level, taken in floors.items():
                    taken.append(floor(level))
    tokens = given.batch * given.length
    least = {level: min(taken) for level, taken in floors.items()}
    found: dict[str, Any] = {"floor_s": least["none"], "floor_full_s": least["full"]}
    found |= {name: side.end(tokens, least["none"]) for name, side in sides.items()}
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


def batches(directory: Path, batch: int, length: int, count: int) -> list[Tensor]:
    """Random ids, the same for every side."""
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (batch, length), generator=drawn) for _ in range(count)]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextlib.contextmanager
def floor_products(directory: Path, given: argparse.Namespace) -> Iterator[Any]:
    """Hands over a function of a level: the seconds of a step's products by frozen weights alone.

    Full recompute makes those of a layer's forward again, but for the last.
    """
    config = json.loads((directory / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = hidden * config.get("num_key_value_heads", heads) // heads
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    made = {shape: _filled(shape[::-1], given.device) for shape in {*shapes}}
    head = _filled((config["vocab_size"], hidden), given.device)
    tokens = given.batch * given.length
    inputs = {size: _filled((tokens, size), given.device) for size in {hidden, kv, ffn}}
    layers = shapes * config["num_hidden_layers"]

    def floor(level: str) -> float:
        wait(given.device)
        began = time.perf_counter()
        again = shapes[:-1] * config["num_hidden_layers"] if level == "full" else []
        for shape in layers + again:
            F.linear(inputs[shape[0]], made[shape])
        logits = F.linear(inputs[hidden], head)
        logits @ head
        for shape in layers:
            inputs[shape[1]] @ made[shape]
        wait(given.device)
        return time.perf_counter() - began

    yield floor


def _filled(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.full(shape, 0.5, device=device, dtype=step_dtype(device))


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
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        serve(given)
        return
    results: dict[str, Any] = {"shape": given.shape.stem}
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
