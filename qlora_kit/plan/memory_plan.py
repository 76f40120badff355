"""The plan of a run: bytes by component and where the peak is, what recomputes, what is where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qlora_kit.config.training import ON_DEVICE, Placement
from qlora_kit.device.found import free_bytes
from qlora_kit.device.target import has_own_memory
from qlora_kit.memory.counter import Sizes
from qlora_kit.options.checks import size_text
from qlora_kit.plan.step_time import StepTime


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch of a run: `rows` of `length` tokens, `supervised` of each trained on.

    Where a run learns from pairs of rows, so many pairs.
    `packed` rows hold several shorter ones, isolated from each other, the longest of which has
    `longest_row` tokens; as many as a pack where that is not known.
    """

    rows: int
    length: int
    supervised: int
    packed: bool = False
    longest_row: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on its device, and where in it they are reached.

    `bytes` has the most of each component over a step (names of run.json's `memory`), `at_peak`
    what is there at the peak: their sum, `paged` left out, is `peak_bytes`, which includes
    `overhead`. `phases` has the peak of tensors in load, inject, forward, backward and step, `host`
    the most that lies in the host's memory while the base is loaded and in a step. `levels` are
    those of the decoder layers, `recomputed` the share of a forward pass's work that backward does
    again. A run fits where `margin_bytes` stay free beside its peak. The micro-batch that is
    planned has `tokens` tokens, padding included; it moves `moved_bytes` between host and device,
    and all that it does is worth `work` multiply-adds. `optim` names the
    optimizer; `why_optim` says why that one, where `auto` left more than one to choose from. `time`
    is estimated for a known card. `placement` is what a run is prepared with, `in_effect` what of
    it lies on the host or is done in pieces then; where the one that costs less did not fit, its
    peak is `peak_bytes_without`. A base that the host cannot hold is read from the cache, layer by
    layer: it stays `in_files`. Where another one, `slower`, fits with less on the host, the step
    takes a share of `gain` less than with that. Of the host a step may take `host_budget_bytes`,
    where that is known; `host_wanted_bytes` is what another placement would take that fits but for
    the host. `fitting_length` has the tokens of the longest rows that fit, where these do not;
    `host_note` says where the host has less free than it needs.
    """

    bytes: Sizes
    peak_bytes: int
    peak_phase: str
    peak_module: str
    at_peak: Sizes
    phases: Sizes
    host: Sizes
    device: str
    levels: tuple[str, ...]
    recomputed: float
    budget_bytes: int | None = None
    margin_bytes: int = 0
    tokens: int = 0
    optim: str = ""
    why_optim: str = ""
    time: StepTime | None = None
    placement: Placement = ON_DEVICE
    in_effect: Placement = ON_DEVICE
    peak_bytes_without: int | None = None
    moved_bytes: int = 0
    work: float = 0.0
    fitting_length: int | None = None
    host_note: str | None = None
    host_budget_bytes: int | None = None
    host_wanted_bytes: int | None = None
    in_files: bool = False
    slower: Placement | None = None
    gain: float = 0.0

    @property
    def host_peak_bytes(self) -> int:
        """The most that lies in the host's memory."""
        return max(self.host.values())

    @property
    def missing_bytes(self) -> int:
        """What the peak and the margin are above the budget; 0 where they fit, or there is none."""
        if self.budget_bytes is None:
            return 0
        return max(0, self.peak_bytes + self.margin_bytes - self.budget_bytes)

    @property
    def missing_on_host_bytes(self) -> int:
        """What a step takes of the host above what it has free; 0 where that is not known."""
        if self.host_budget_bytes is None:
            return 0
        return max(0, self.host["step"] - self.host_budget_bytes)

    @property
    def fits(self) -> bool:
        """Whether peak and margin are within the budget, and the host's part within what it has.

        True where neither is known.
        """
        return not self.missing_bytes and not self.missing_on_host_bytes

    @property
    def beside_bytes(self) -> int:
        """What a step takes of a host whose memory is not the device's."""
        return self.host["step"] if has_own_memory(torch.device(self.device)) else 0

    @property
    def place(self) -> str:
        """Where the peak is, in words."""
        return f"{self.peak_phase}, {self.peak_module}" if self.peak_module else self.peak_phase

    @property
    def recompute(self) -> str:
        """The levels in words: `full`, or `12 full, 4 selective, 16 none`."""
        counts = {level: self.levels.count(level) for level in dict.fromkeys(self.levels)}
        if len(counts) == 1:
            return self.levels[0]
        return ", ".join(f"{count} {level}" for level, count in counts.items())

    @property
    def optimizer(self) -> str:
        """The optimizer in words, with the reason where there is one."""
        return f"{self.optim} ({self.why_optim})" if self.why_optim else self.optim

    def placed(self, shown: Callable[[int], str] = "{} bytes".format) -> str:
        """What lies where, in a sentence; empty where everything is on the device, at once."""
        said, words = [], self.in_effect.words
        if self.in_files:
            stays = replace(self.in_effect, base_on_host=False).words
            words = ", ".join(filter(None, ("base in the files of the cache", stays)))
        if self.slower is not None:
            other = self.slower.words or "all on the device"
            said.append(f"faster as planned by {self.gain:.0%} than {other}, which fits too")
        if self.peak_bytes_without is not None:
            without = " and without tiles" if self.in_effect.mlp_tiled else ""
            peak = shown(self.peak_bytes_without)
            said.append(f"with all on the device{without} the peak would be {peak}")
        return f"{words}: {'; '.join(said)}" if said else words

    @property
    def lower_length(self) -> str:
        """The flag of the rows' length, with one that fits where it is known."""
        return "--max_length" + (f" to {self.fitting_length}" if self.fitting_length else "")

    @property
    def planned(self) -> Sizes:
        """The `planned` part of run.json's `memory`."""
        return {**self.bytes, "peak": self.peak_bytes}

    def as_json(self) -> dict[str, Any]:
        """What `qlora-kit plan --json` prints of it."""
        result: dict[str, Any] = {
            "bytes": dict(self.bytes),
            "peak_bytes": self.peak_bytes,
            "peak": {"phase": self.peak_phase, "module": self.peak_module},
            "at_peak": dict(self.at_peak),
            "phases": dict(self.phases),
            "host_peak_bytes": self.host_peak_bytes,
            "host": dict(self.host),
            "budget_bytes": self.budget_bytes,
            "margin_bytes": self.margin_bytes,
            "fits": self.fits,
            "device": self.device,
            "gradient_checkpointing": self.recompute,
            "levels": list(self.levels),
            "recomputed": self.recomputed,
            "optim": self.optim,
            "why_optim": self.why_optim,
            "placement": asdict(self.in_effect),
            "in_files": self.in_files,
            "peak_bytes_without": self.peak_bytes_without,
            "host_budget_bytes": self.host_budget_bytes,
            "moved_bytes": self.moved_bytes,
        }
        if self.time is not None:
            result["time"] = self.time.as_json()
        return result


def note_of_host(plan: MemoryPlan) -> str | None:
    """A sentence where a run on a card needs more of its host than is free; else None."""
    free = free_bytes(torch.device("cpu"))
    if not has_own_memory(torch.device(plan.device)) or plan.host_peak_bytes <= free:
        return None
    return (
        f"{size_text(plan.host_peak_bytes)} of the host's memory are needed, and {size_text(free)} "
        "are free here: close other programs, or leave less to the host (--no_offload_base, "
        "--no_offload_activations, --no_offload_embedding)"
    )
