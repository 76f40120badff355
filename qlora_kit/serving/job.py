"""A request on its way through the model: what it asks, and what comes of it, piece by piece."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_kit.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Event:
    """What a job has come to: more text, and perhaps its end."""

    text: str = ""
    finish: str | None = None
    """the API's reason: `stop` at an end token or a stop string, `length` at the limit"""
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """One answer that is asked for, made in the event loop that waits for its events."""

    ids: list[int]
    adapter: str | None
    max_new_tokens: int
    eos_ids: frozenset[int]
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...] = ()
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    tokens: int = 0
    """tokens that were drawn"""
    left: bool = False
    """whether nobody waits for it any more"""
    asked_s: float = field(default_factory=time.monotonic)
    began_s: float | None = None
    """when it got its place in the batch"""
