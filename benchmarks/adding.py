"""What a running generation loses while adapters are added to its bank, and how long adding takes.

    python benchmarks/adding.py

One thread decodes a row with an adapter of the bank, as the server does; another adds adapters on
all linears from their files and removes them, some in a burst, then none for as long. Tokens are
counted by the parts of steps that lie within bursts and outside of them: both sides in one run.
The base is a random Llama of 160 M, its tokenizer that of QLORA_KIT_DATA.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from plan_grid import SHAPE
from random_checkpoint import make_base_files
from record import make_parser, write_result

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.request import Request
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import clear_adapter, inject_lora, lora_layers

Spans = list[tuple[float, float]]
"""When something began and ended, in seconds."""
PROMPT, ANSWER = 16, 64
"""Tokens of the request that is decoded again and again."""
BURST = 5
"""Adapters that are added one after another."""


def main() -> None:
    """Measure each number of bits, print and write."""
    parser = make_parser(__doc__, "adding")
    parser.add_argument("--config", type=Path, help="another shape than that of 160 M")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bursts", type=int, default=12, help=f"of {BURST} adapters (%(default)s)")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(os.environ["QLORA_KIT_DATA"]) / "models/stories260K"
        model = make_base_files(asked.config or SHAPE, Path(temporary) / "base", tokenizer)
        for bits in asked.bits:
            base = load_base(str(model), bits=bits, dtype=asked.dtype, device=asked.device)
            adapter = Path(temporary) / f"adapter-{bits}"
            linears = make_adapter(base, asked.rank, adapter)
            row = {"bits": bits, "linears": linears, **measure(base, adapter, asked.bursts)}
            table.append(row)
            print(
                f"{bits:>2} bits: {row['tokens_per_s']:.1f} tokens/s, while adding "
                f"{row['tokens_per_s_adding']:.1f} ({row['share']:.2f}); an adapter of "
                f"{row['adapter_bytes'] / 2**20:.1f} MiB in {1e3 * row['add_s']:.0f} ms; "
                f"longest step {1e3 * row['longest_step_s']:.0f} ms, while adding "
                f"{1e3 * row['longest_step_adding_s']:.0f} ms",
                flush=True,
            )
    print(write_result(asked, {"threads": torch.get_num_threads(), "table": table}))


def make_adapter(base: Base, rank: int, directory: Path) -> int:
    """Save an adapter on all linears, and leave the base without it; how many linears it has."""
    inject_lora(base.model, LoRAConfig(r=rank, target_modules="all-linear"))
    drawn = torch.Generator().manual_seed(0)
    for layer in lora_layers(base.model).values():
        up = layer.weights("default")[1]
        up.data.copy_(torch.randn(up.shape, generator=drawn) / 100)
    save_adapter(base, directory)
    clear_adapter(base.model, "default")
    return len(lora_layers(base.model))


def measure(base: Base, adapter: Path, bursts: int) -> dict[str, Any]:
    """Tokens a second with and without adding, and what adding takes."""
    bank, steps, added, took = AdapterBank(base), Spans(), Spans(), []
    bank.add("used", adapter)
    engine = Engine(base.model, pad_id=0, bank=bank)
    done = threading.Event()

    def decode() -> None:
        while not done.is_set():
            if engine.idle:
                engine.add(Request(range(3, 3 + PROMPT), ANSWER, adapter="used"))
            began = time.perf_counter()
            engine.step()
            steps.append((began, time.perf_counter()))

    def wait(count: int, seconds: float = 0.0) -> None:
        """For so many more steps, and so long."""
        until, last = time.perf_counter() + seconds, len(steps) + count
        while thread.is_alive() and (len(steps) < last or time.perf_counter() < until):
            time.sleep(0.01)

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        wait(ANSWER)  # the first steps make what later ones find
        warm = len(steps)
        for _ in range(bursts):
            began = time.perf_counter()
            for number in range(BURST):
                before = time.perf_counter()
                bank.add(f"{number}", adapter)
                took.append(time.perf_counter() - before)
                bank.remove(f"{number}")
            added.append((began, time.perf_counter()))
            wait(3, time.perf_counter() - began)
    finally:
        done.set()
        thread.join()
    nbytes = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    return {
        "adapter_bytes": nbytes,
        "add_s": statistics.median(took),
        **rates(steps[warm:], added),
    }


def rates(steps: Spans, added: Spans) -> dict[str, float]:
    """Tokens a second inside and outside of `added`, of which a part of a step is a part."""
    inside = [sum(overlap(step, one) for one in added) for step in steps]
    lengths = [end - begin for begin, end in steps]
    tokens = sum(part / length for part, length in zip(inside, lengths, strict=True))
    adding, alone = sum(inside), sum(lengths) - sum(inside)
    slow = [length for part, length in zip(inside, lengths, strict=True) if part]
    quick = [length for part, length in zip(inside, lengths, strict=True) if not part]
    rate, rate_adding = (len(steps) - tokens) / alone, tokens / adding
    return {
        "tokens_per_s": rate,
        "tokens_per_s_adding": rate_adding,
        "share": rate_adding / rate,
        "longest_step_s": max(quick),
        "longest_step_adding_s": max(slow),
    }


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """For how long both go on."""
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


if __name__ == "__main__":
    main()
