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
from qlora_kit.serving.errors import no_room

OF_CACHE = 0.75
"""The part of what is free that caches may take. A step has the rest for what it computes, for the
largest layer of the cache twice, which grows by being copied, and for gaps between blocks."""
OF_ADAPTERS = 0.5
"""The part of what caches leave that adapters may take which come while the server runs."""


@dataclass(frozen=True)
class Room:
    """The most bytes that the caches of all rows may take, and the limits that this leaves.

    `cache` is None where the kind of cache is not known, and nothing is limited. `adapters` are the
    bytes for those that are added, all together.
    """

    cache: int | None
    adapters: int
    limits: Limits
    note: str | None = None
    """what is to be said where the limits were lowered"""

    @classmethod
    def of(cls, engine: Engine, device: torch.device, limits: Limits, max_batch: int) -> Room:
        """What is free now. Errors: `ResourceError` where no answer has room."""
        most = engine.cache_bytes(limits.max_length, max_batch)
        empty_cache()
        free = free_bytes(device)
        room = int(OF_CACHE * free) if most is None else min(most, int(OF_CACHE * free))
        adapters = int(OF_ADAPTERS * (free - room))
        if most is None:
            return cls(None, adapters, limits)
        lengths = range(1, limits.max_length + 1)
        longest = bisect.bisect_right(lengths, room, key=lambda one: engine.cache_bytes(one) or 0)
        if longest == limits.max_length:
            return cls(room, adapters, limits)
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
        return cls(room, adapters, dataclasses.replace(limits, max_length=longest), note)

    def check_adapter(self, needed: int, held: int) -> None:
        """Refuse an adapter of so many bytes beside those that were added. Errors: `ApiError`.

        `held` are negative where adapters that were there at the start have gone.
        """
        if held + needed > self.adapters:
            raise no_room(needed, max(0, self.adapters - held))
