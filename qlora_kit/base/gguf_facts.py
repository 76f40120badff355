"""What llama.cpp does of its own in a model family, which nothing in a GGUF says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp reads it from a GGUF; the defaults are those of most families.

    `architecture` is its name there. `pairs_rows` says that its rotary embedding turns neighbours
    (rows 2i and 2i + 1 of a head) where transformers turns a row of each half (i and i + d/2).
    `norm_offset` is what is added to the norms' weights in the file, for the model multiplies by
    that sum and llama.cpp by what it reads.
    """

    architecture: str
    pairs_rows: bool = False
    norm_offset: float = 0.0
