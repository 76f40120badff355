"""How fast answers come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class Speed:
    """Tokens of prompts, tokens that were drawn, and the seconds that both took."""

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, and the time that each takes to come; not what is done with it."""
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.tokens:,} tokens in {self.seconds:.2f} s: {rate:,.1f} new tokens/s, "
            f"with the time of prompts of {self.prompt_tokens:,} tokens"
        )
