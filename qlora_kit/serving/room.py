"""What a server takes of its device beside the base and the adapters that it began with."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass

import torch

from qlora_kit.device.found import empty_cache, free_bytes
from qlora_kit.errors import ResourceError
from qlora_kit.generation.engine import Engine
from qlora_kit.options.checks import size_text
from qlora_kit.serving.api import Limits
from qlora_kit.serving.errors import BROKEN, ApiError

OF_CACHE = 0.75
"""The part of what is free that caches may take. A step has the rest for what it computes, for the
largest layer of the cache twice, which grows by being copied, and for gaps between blocks."""
OF_COPIES = 0.25
"""The part of what is free that weights may take which steps lay out again, all of them or none."""
OF_ROWS = 0.25
"""The part of what caches leave that rows of different adapters may take as copies of their own."""
OF_ADAPTERS = 0.5
"""The part of what caches leave that adapters may take which come while the server runs."""


@dataclass(frozen=True)
class Room:
    """The most bytes that the caches of all rows may take, and the limits that this leaves.

    `cache` is None where the kind of cache is not known, and nothing is limited. `adapters` are the
    bytes for those that are added, all together, `copies` those of weights that steps lay out
    again, and `rows` the most for rows that have different adapters.
    """

    cache: int | None
    adapters: int
    limits: Limits
    copies: int = 0
    rows: int = 0
    note: str | None = None
    """what is to be said where the limits were lowered"""

    @classmethod
    def of(cls, engine: Engine, device: torch.device, limits: Limits, max_batch: int) -> Room:
        """What is free now. Errors: `ResourceError` where no answer has room."""
        most = engine.cache_bytes(limits.max_length, max_batch)
        empty_cache()
        free, copies = free_bytes(device), engine.copied_bytes()
        if copies > OF_COPIES * free:
            engine.copy_nothing()
            copies = 0
        free -= copies
        room = int(OF_CACHE * free) if most is None else min(most, int(OF_CACHE * free))
        adapters, rows = (int(part * (free - room)) for part in (OF_ADAPTERS, OF_ROWS))
        if most is None:
            return cls(None, adapters, limits, copies, rows)
        lengths = range(1, limits.max_length + 1)
        longest = bisect.bisect_right(lengths, room, key=lambda one: engine.cache_bytes(one) or 0)
        if longest == limits.max_length:
            return cls(room, adapters, limits, copies, rows)
        needed, there = size_text(engine.cache_bytes(limits.max_length) or 0), size_text(room)
        if longest < 2:
            raise ResourceError(
                f"a cache of {limits.max_length} tokens takes {needed}, and {there} are there",
                "close other programs, or load the base in 4 bits",
            )
        note = (
            f"max_length is {longest} and not {limits.max_length}, of which the cache would take "
            f"{needed}: {there} are there"
        )
        limits = dataclasses.replace(limits, max_length=longest)
        return cls(room, adapters, limits, copies, rows, note)

    def check_adapter(self, needed: int, held: int) -> None:
        """Refuse an adapter of so many bytes beside those that were added. Errors: `ApiError`.

        `held` are negative where adapters that were there at the start have gone.
        """
        if held + needed > self.adapters:
            there = size_text(max(0, self.adapters - held))
            raise ApiError(
                503,
                f"the adapter takes {size_text(needed)}, and {there} are left for adapters that "
                "are added; remove another one",
                type=BROKEN,
                code="out_of_memory",
            )
