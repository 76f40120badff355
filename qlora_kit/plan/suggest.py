"""Changes of a run that does not fit, each with the plan of the run so changed; the best first.

What costs least comes first: time (recompute, what lies on the host or is done in tiles, smaller
micro-batches), then length, then the optimizer's states on the host, then bits, then the adapters'
size, then the bits of the head. Of each kind the mildest change that fits is named, of lengths the
longest one (`longest.py`); where none fits alone, they are put together.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_kit.config.base import DEFAULT_BITS, BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import PLACED, TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import MOST_ROWS
from qlora_kit.plan.longest import longest_rows
from qlora_kit.plan.memory_plan import BatchShape, MemoryPlan
from qlora_kit.plan.plan import Planner

SHORTEST = 128
"""Tokens; shorter rows than that are not suggested."""
SMALLEST_RANK = 8


@dataclass(frozen=True)
class Options:
    """What a plan depends on."""

    base: BaseConfig
    lora: LoRAConfig
    training: TrainingConfig
    length: int
    packing: bool = False

    @property
    def largest(self) -> BatchShape:
        """The largest micro-batch."""
        return BatchShape(self.training.rows, self.length, self.length, self.packing)

    def differences(self, other: Options) -> str:
        """The flags that make these options of the `other` ones."""
        flags = [
            ("bits", self.base.bits, other.base.bits),
            ("lora_r", self.lora.r, other.lora.r),
            ("target_modules", self.lora.target_modules, other.lora.target_modules),
            (
                "gradient_checkpointing",
                self.training.gradient_checkpointing,
                other.training.gradient_checkpointing,
            ),
            ("batch_size", self.training.rows, other.training.rows),
            (
                "gradient_accumulation_steps",
                self.training.gradient_accumulation_steps,
                other.training.gradient_accumulation_steps,
            ),
            ("optim", self.training.optim, other.training.optim),
            ("max_length", self.length, other.length),
            ("head_bits", self.base.head_bits, other.base.head_bits),
        ]
        changed = [f"--{name} {new}" for name, new, old in flags if new != old]
        for name in PLACED:
            if getattr(self.training, name) and not getattr(other.training, name):
                changed.append(f"--{name}")
        return " ".join(changed)


@dataclass(frozen=True)
class Suggestion:
    """Flags that change a run, and the plan of the run with them."""

    change: str
    plan: MemoryPlan


def suggest(options: Options, planner: Planner, device: str, budget_bytes: int) -> list[Suggestion]:
    """What would make a run fit into the budget; empty where nothing here does."""
    found = []
    planners = {_made(options): planner}

    def plan_of(changed: Options) -> MemoryPlan:
        key = _made(changed)
        if key not in planners:
            planners[key] = Planner(
                changed.base,
                changed.lora,
                changed.training,
                device,
                clock=planner.clock,
                host_bytes=planner.room,
            )
        training = changed.training
        return planners[key].plan(
            changed.largest,
            training.gradient_checkpointing,
            budget_bytes,
            training.gradient_accumulation_steps,
        )

    def as_long_as_fits(changed: Options) -> Options:
        if changed.length == options.length:
            return changed
        room, most, training = budget_bytes, options.length, changed.training
        level, steps = training.gradient_checkpointing, training.gradient_accumulation_steps
        where = planner.placements[-1]
        longest = longest_rows(planner, changed.largest, level, room, where, steps, most)
        return replace(changed, length=max(longest.tokens, changed.length))

    kinds = _kinds(options, device, planner.run.fused)
    least = least_of_weights(options, planner, plan_of(options))
    if least + planner.overhead.fixed + planner.overhead.margin(least) > budget_bytes:
        return []  # a plan of each change takes a minute or two of a large base
    for kind in kinds:
        # Each takes less than the one before, so half of those that are left are planned no more.
        changes = list(kind)
        first = bisect.bisect_left(changes, True, key=lambda changed: plan_of(changed).fits)
        if first < len(changes):
            changed = as_long_as_fits(changes[first])
            found.append(Suggestion(changed.differences(options), plan_of(changed)))
    if found:
        return found
    together = options
    for step in range(len(kinds)):
        strongest = list(_kinds(together, device, planner.run.fused)[step])
        if not strongest:
            continue
        together = strongest[-1]
        if (plan := plan_of(together)).fits:
            return [Suggestion(together.differences(options), plan)]
    return []


def least_of_weights(options: Options, planner: Planner, plan: MemoryPlan) -> int:
    """Bytes of the device that weights take whatever is changed here; 0 where that is not known.

    No format has fewer than 4 bits, and without one a weight has at most 32.
    """
    fused, device = planner.run.fused, planner.device
    moves = any(_recompute(options)) or any(_placements(options, device, fused))
    if device != "cpu" and (moves or plan.placement != planner.placements[-1]):
        return 0  # more of them may lie on the host
    quantized, other = plan.bytes["weights_quantized"], plan.bytes["weights_other"]
    if plan.placement.embedding_on_host:
        other = 0  # rows that are fetched, as many as a batch asks for
    return (quantized if options.base.bits in (None, 4) else quantized // 4) + other // 8


def _made(options: Options) -> tuple[object, ...]:
    """What a planner is made for."""
    training = options.training
    placed = (getattr(training, name) for name in PLACED)
    return options.base, options.lora, training.optim, training.placements_on(True), *placed


def _kinds(options: Options, device: str, fused: bool) -> tuple[Iterator[Options], ...]:
    """The kinds of change, the best first, each from its mildest on; always as many.

    Of `fused` layers the MLPs can go over tiles.
    """
    return (
        _recompute(options),
        _placements(options, device, fused),
        _batch(options),
        _length(options),
        _optimizer(options, device),
        _bits(options),
        _adapters(options),
        _head(options),
    )


def _recompute(options: Options) -> Iterator[Options]:
    if options.training.gradient_checkpointing in ("none", "selective"):
        yield _training(options, gradient_checkpointing="auto")


def _placements(options: Options, device: str, fused: bool) -> Iterator[Options]:
    """What was asked to stay, on the host after all or in tiles; what is left to auto is tried."""
    changed = options
    for name in PLACED:
        has_effect = fused if name == "tiled_mlp" else device != "cpu"
        if getattr(options.training, name) is False and has_effect:
            with contextlib.suppress(ConfigError):  # where nothing recomputes, nothing is moved
                changed = _training(changed, **{name: True})
                yield changed


def _head(options: Options) -> Iterator[Options]:
    for bits in (8, 4):
        if options.base.bits != 16 and options.base.head_bits > bits:
            yield replace(options, base=replace(options.base, head_bits=bits))


def _batch(options: Options) -> Iterator[Options]:
    rows, steps = options.training.rows, options.training.gradient_accumulation_steps
    while rows > 1 and rows % 2 == 0 and 2 * steps <= MOST_ROWS:
        rows, steps = rows // 2, steps * 2
        yield _training(options, batch_size=rows, gradient_accumulation_steps=steps)


def _length(options: Options) -> Iterator[Options]:
    length = options.length // 2
    while length >= SHORTEST:
        yield replace(options, length=length)
        length //= 2


def _optimizer(options: Options, device: str) -> Iterator[Options]:
    if options.training.optim in ("adamw", "adamw_8bit", "paged_adamw_32bit"):
        name = "paged_adamw_8bit" if device == "cuda" else "adamw_8bit"
        if name != options.training.optim:
            yield _training(options, optim=name)


def _bits(options: Options) -> Iterator[Options]:
    for bits in (8, 4):
        if (options.base.bits or DEFAULT_BITS) > bits:
            yield replace(options, base=replace(options.base, bits=bits))


def _adapters(options: Options) -> Iterator[Options]:
    lora = options.lora
    if lora.target_modules == "all-linear":
        yield replace(options, lora=replace(lora, target_modules="auto"))
    rank = lora.r // 2
    while rank >= SMALLEST_RANK:
        yield replace(options, lora=replace(lora, r=rank))
        rank //= 2


def _training(options: Options, **changes: object) -> Options:
    return replace(options, training=replace(options.training, **changes))  # type: ignore[arg-type]
