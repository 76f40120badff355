"""Microseconds a switch among many adapters, by the linears that they are on: ours and PEFT's."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.lora.bank import AdapterBank
from switching_parts.made import make_base, peft_of_many, save_adapters

LAYERS = 32
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""As many linears as a 7B has: what they multiply is of no account to a switch."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "query and value": ["q_proj", "v_proj"],
    "all linears": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
}
RANK = 4
REPEATS = 3


def measure(
    scratch: Path, adapters: Sequence[int], counts: Sequence[int], peft_counts: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each set of linears and number of adapters."""
    base = make_base(SHAPE, scratch / "small", bits=4)
    rows = []
    for label, targets in TARGETS.items():
        save_adapters(base, scratch / label, ["one"], RANK, ",".join(targets))
        for number in adapters:
            names = [f"adapter{i}" for i in range(number)]
            bank = AdapterBank(base)
            for name in names:
                bank.add(name, scratch / label / "one")
            ours = {count: _switch_us(bank.use, names, count) for count in counts}
            bank.use(None)
            model = peft_of_many(scratch / "small", names, RANK, targets)
            theirs = {count: _switch_us(model.set_adapter, names, count) for count in peft_counts}
            most = max(peft_counts)
            rows.append(
                {
                    "linears": label,
                    "modules": LAYERS * len(targets),
                    "adapters": number,
                    "ours_us": ours,
                    "peft_us": theirs,
                    "times_as_fast": theirs[most] / ours[max(counts)],
                }
            )
            print(rows[-1], flush=True)
    return rows


def _switch_us(use: Callable[[str], object], names: Sequence[str], count: int) -> float:
    """Microseconds of each of so many switches in a row, to random names: the median of some."""
    drawn = random.Random(0)
    taken = []
    for _ in range(REPEATS):
        order = [drawn.choice(names) for _ in range(count)]
        began = time.perf_counter()
        for name in order:
            use(name)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) / count * 1e6
