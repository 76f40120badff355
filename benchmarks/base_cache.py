"""What the cache of quantized bases saves, and that no damaged file of it is ever used.

First starts (which quantize and keep), second starts, and reading and hashing the same files once
take turns, each in a process of its own. Then one file of a small base's entry after another is
damaged, and the base loaded: it has to be the one that was made. Needs QLORA_KIT_DATA for the shape
and a tokenizer, unless a model is named, and disk for the model and its entry.

    python benchmarks/base_cache.py [--model DIRECTORY] [--bits 4] [--rounds 3] [--damaged 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from seven_parts.programs import HASH

START = """
import json, sys, time
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.found import peak_bytes
from qlora_kit.memory.counter import weight_bytes
base = open_base(BaseConfig(sys.argv[1], bits=int(sys.argv[2]), dtype="bf16", device="cpu"))
before, notes = peak_bytes(base.device), [*base.notes]
began = time.perf_counter()
model = read_weights(base, note=notes.append)
seconds = time.perf_counter() - began
said = {"seconds": seconds, "peak_rss": peak_bytes(base.device), "rss_before": before}
print(json.dumps({**said, "weights": weight_bytes(model)["weights"], "notes": notes}))
"""


def measured(code: str, *arguments: object) -> dict[str, Any]:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def starts(model: Path, bits: int, rounds: int, cache: Path) -> dict[str, Any]:
    """First and second starts and plain reading in turns; the medians, and all seconds."""
    seconds: dict[str, list[float]] = {"first": [], "second": [], "read_and_hash": []}
    peaks: dict[str, list[int]] = {"first": [], "second": []}
    nbytes = weights = 0
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for kind in ("first", "second"):
            found = measured(START, model, bits)
            from_cache = any("from the cache" in note for note in found["notes"])
            if from_cache != (kind == "second"):
                raise SystemExit(f"the {kind} start is none: {found['notes']}")
            seconds[kind].append(found["seconds"])
            peaks[kind].append(found["peak_rss"])
            weights, before = found["weights"], found["rss_before"]
        read = measured(HASH, cache)
        seconds["read_and_hash"].append(read["seconds"])
        nbytes = read["bytes"]
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "bits": bits,
        "cache_bytes": nbytes,
        "weight_bytes": weights,
        "medians_s": medians,
        "seconds": seconds,
        "first_by_second": medians["first"] / medians["second"],
        "second_by_read_and_hash": medians["second"] / medians["read_and_hash"],
        "peak_rss": {kind: max(found) for kind, found in peaks.items()},
        "second_above_weights": max(peaks["second"]) - weights,
        "rss_before_loading": before,
    }


def damage(count: int, seed: int) -> dict[str, Any]:
    """Damage files of an entry and load the base: how often what was made came, and from where."""
    import torch

    from qlora_kit.base import cache
    from qlora_kit.base.kept_base import cache_directory, listed
    from qlora_kit.base.load import load_base

    cache.SMALLEST = 0
    draw, seen = random.Random(seed), Counter[str]()
    directory = cache_directory()
    assert directory is not None
    truth = load_base("tiny", dtype="bf16", device="cpu").model.state_dict()
    (entry,) = (one.path for one in listed(directory))
    with tempfile.TemporaryDirectory() as temporary:
        good = shutil.copytree(entry, Path(temporary) / "good")
        for _ in range(count):
            shutil.rmtree(entry, ignore_errors=True)
            shutil.copytree(good, entry)
            path = entry / draw.choice(sorted(os.listdir(entry)))
            kind = _damage(path, draw)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                base = load_base("tiny", dtype="bf16", device="cpu")
            found = base.model.state_dict()
            same = found.keys() == truth.keys()
            same &= all(torch.equal(found[name], tensor) for name, tensor in truth.items())
            told = any("made again" in str(one.message) for one in said)
            whole = all(
                (entry / name).read_bytes() == (good / name).read_bytes()
                for name in os.listdir(good)
                if name.endswith(".safetensors")
            )
            seen[kind] += 1
            seen["rebuilt"] += told and whole
            seen["used"] += not same
    return {"cases": count, **seen}


def _damage(path: Path, draw: random.Random) -> str:
    """Change a file at a random place; what was done."""
    held = bytearray(path.read_bytes())
    place = draw.randrange(len(held))
    kind = draw.choice(("bit", "bit", "byte", "zeros", "cut", "longer"))
    if kind == "bit":
        held[place] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        held[place] = (held[place] + draw.randrange(1, 256)) % 256
    elif kind == "zeros":
        zeros = bytes(min(4096, len(held) - place))
        held[place : place + len(zeros)] = zeros
        if held == path.read_bytes():  # they were there
            held[place] ^= 1
    elif kind == "cut":
        del held[place:]
    else:
        held += draw.randbytes(draw.randrange(1, 100))
    path.write_bytes(held)
    return kind


def _made(given: argparse.Namespace, folder: Path) -> Path:
    data, directory = Path(os.environ["QLORA_KIT_DATA"]), folder / "model"
    make_checkpoint(data / "configs" / given.config, directory, shards=2)
    copy_tokenizer(data / "models/stories260K", directory)
    return directory


def main() -> None:
    parser = make_parser(__doc__, "base_cache")
    parser.add_argument("--model", type=Path, help="a model (a random one of --config's shape)")
    parser.add_argument("--config", default="tinyllama_1b_chat_v1.0.json")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--damaged", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["QLORA_KIT_CACHE"] = str(cache := Path(temporary) / "cache")
        table = []
        if given.bits:
            model = given.model or _made(given, Path(temporary))
            for bits in given.bits:
                row = starts(model, bits, given.rounds, cache)
                table.append(row)
                print({k: v for k, v in row.items() if k != "seconds"}, flush=True)
        shutil.rmtree(cache, ignore_errors=True)
        damaged = damage(given.damaged, seed=0)
    name = given.config.removesuffix(".json") if given.model is None else given.model.name
    print(write_result(given, {"model": name, "starts": table, "damaged": damaged}))
    if damaged.get("used") or damaged["rebuilt"] != given.damaged:
        raise SystemExit(f"a damaged file was used, or not made again: {damaged}")


if __name__ == "__main__":
    main()
