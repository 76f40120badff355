"""The parts of the GPU benchmark, the most valuable first.

Each part is a module with `run(setting, found)`, which fills `found` as it goes, so that what was
measured before a failure stays, and returns the line that is printed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part by number and name: the `seconds` it is expected to take, and those it may take."""

    number: int
    name: str
    seconds: int
    limit: int
    shows: str


PARTS = (
    Part(1, "start", 20, 60, "versions, the card, the context's bytes"),
    Part(2, "kernels", 15, 60, "quantized bytes, decoding and products against double precision"),
    Part(5, "loading", 15, 60, "the 8B shape onto the card: read, copied, encoded"),
    Part(6, "memory", 40, 100, "planned against allocated and reserved bytes"),
    Part(7, "speed", 40, 100, "steps of ours, one profiled; the floor of products"),
    Part(9, "decode", 15, 60, "tokens a second, and one linear of few rows"),
    Part(10, "optimizers", 15, 45, "the optimizer's step alone; paged states saved and restored"),
    Part(8, "peft", 40, 100, "PEFT on the same shape"),
    Part(16, "memory_7b", 20, 60, "planned against allocated bytes of the 7B shape"),
    Part(15, "triton", 35, 100, "kernels of ours against torch's operations and bitsandbytes"),
    Part(4, "commands", 45, 120, "finetune, resume, evaluate, generate, export"),
    Part(13, "shortage", 40, 110, "a card that is too small: levels, replanning, halving, export"),
    Part(3, "families", 40, 100, "gradients of every family against the CPU's"),
    Part(11, "old_cards", 25, 80, "attention without flash; soft caps; long rows"),
    Part(12, "lengths", 25, 60, "new lengths with cuDNN's attention and without"),
    Part(14, "tests", 40, 120, "tests/cuda, where pytest is there"),
)
"""In the order in which they run. Those from loading to optimizers share one model."""


def chosen(names: str | None) -> list[Part]:
    """The parts of a list of numbers and names, in their order; all without one.

    Errors: `ValueError` for one that is not there.
    """
    if not names:
        return list(PARTS)
    known = {key: part for part in PARTS for key in (str(part.number), part.name)}
    asked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = {known[name].name for name in asked}
    return [part for part in PARTS if part.name in wanted]
