"""The readers of a GGUF: llama.cpp, and transformers where it knows the family.

llama.cpp says which tokens texts are, at which tokens answers end, and the logits; transformers
makes all tensors fp32 and runs them, which takes the memory of that. It leaves much of what a GGUF
says of a model (factors, biases, windows), so that it is given the config: it judges the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from qlora_kit.base.base import Base
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import free_bytes
from qlora_kit.export.gguf_tokens import LLAMA_CPP, GgufTokens
from qlora_kit.export.llamacpp import NOT_INSTALLED, LlamaCpp, llama_library
from qlora_kit.export.readers import Read, trained
from qlora_kit.export.transformers_reader import (
    TRANSFORMERS,
    model_pieces,
    read_gguf,
    read_tokenizer,
)
from qlora_kit.export.verify import Decoded, Piece, compare
from qlora_kit.gguf.layout import gguf_facts
from qlora_kit.process.out_of_memory import is_out_of_memory

WORK = 2**42
"""Parameters times positions: what a CPU multiplies in some minutes."""
SEVERAL, EACH = 4, 2
"""Rows among which what is computed is shared at least, and positions of each that is asked
about."""
ENOUGH = 100
"""Tokens of which the mean says something."""
FEW = (
    "llama.cpp was asked about {} tokens alone, of {}: it gives the probabilities of so large a "
    "vocabulary slowly here, and their mean is a rough one"
)
FEWEST = 256
"""llama.cpp has no shorter context."""
BESIDE = 1.2
"""What llama.cpp takes in weights: its cache, activations and logits beside them. An allowance."""
HELD, READING = 4.4, 8.8
"""Bytes that transformers takes for a parameter of a GGUF, on the device and on the host before:
fp32, with some room, and twice that at the end of its reading."""


@dataclass(frozen=True)
class GgufReaders:
    """What reads a file, for what it is to be compared with; llama.cpp with an adapter's on it."""

    base: Base
    file: Path
    rows: Sequence[Encoded]
    lora: Path | None = None

    @cached_property
    def ours(self) -> Decoded:
        """The model as trained."""
        return trained(self.base, self.rows)

    @cached_property
    def tokens(self) -> GgufTokens:
        """The tokens that the file should give."""
        return GgufTokens(self.base, self.rows)

    def all(self, absent: dict[str, str]) -> list[Read]:
        """What each reader finds that is not `absent`; one that memory ends for joins those.

        Errors: `ExportError`.
        """
        reads = []
        if LLAMA_CPP not in absent:
            reads.append(self.by_llama_cpp())
        if TRANSFORMERS not in absent:
            try:
                reads.append(self.by_transformers())
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                absent[TRANSFORMERS] = "memory ended while it did"
        return reads

    def by_llama_cpp(self) -> Read:
        """What llama.cpp finds. Errors: `ExportError`."""
        longest = max(len(row) for row in self.ours.rows)
        with LlamaCpp(self.file, lora=self.lora, context=max(FEWEST, longest)) as llama:
            texts = self.tokens.check_llama(llama)
            lengths = [len(row) - 1 for row in self.ours.rows]
            work = max(1, WORK // self.base.parameters)
            places = spread(lengths, llama.positions, work)
            pieces = _pieces(llama, self.ours.rows, places)
            found = compare(self.ours, pieces, normalized=not llama.gives_logits)
            how = f"whole, by {llama.library}"
        of = sum(lengths)
        note = FEW.format(found.tokens, of) if found.tokens < min(of, ENOUGH) else None
        return Read(LLAMA_CPP, how, found, texts, len(self.tokens.texts), note)

    def by_transformers(self) -> Read:
        """What transformers finds. Errors: `ExportError`."""
        texts = self.tokens.equal(read_tokenizer(self.file.parent, file=self.file.name))
        held = HELD * self.base.parameters
        device = self.base.device if free_bytes(self.base.device) >= held else torch.device("cpu")
        model = read_gguf(self.file, self.base.model.config, device)
        found = compare(self.ours, model_pieces(model, self.ours.rows))
        how = "with the settings of config.json"
        return Read(TRANSFORMERS, how, found, texts, len(self.tokens.texts))

    def absent(self) -> dict[str, str]:
        """The readers that there are not, and why."""
        size = self.file.stat().st_size
        return absent_readers(self.base, size, adapter=self.lora is not None)


def absent_readers(base: Base, size: int, *, adapter: bool) -> dict[str, str]:
    """Who does not read a GGUF of a base of `size` bytes, with an adapter's on it or without.

    For each the reason: it is not here, does not do that, or has not the memory for it.
    """
    found, free = {}, free_bytes(torch.device("cpu"))
    if llama_library(adapter=adapter) is None:
        found[LLAMA_CPP] = NOT_INSTALLED
    elif BESIDE * size > free:
        found[LLAMA_CPP] = _takes(BESIDE * size, free)
    family = gguf_facts(base.model.config.model_type).architecture
    if adapter:
        found[TRANSFORMERS] = "it adds no adapter to a GGUF"
    elif family not in GGUF_SUPPORTED_ARCHITECTURES:
        found[TRANSFORMERS] = f"it reads no {family} models out of a GGUF"
    elif READING * base.parameters > free:
        found[TRANSFORMERS] = _takes(READING * base.parameters, free)
    return found


def _takes(needed: float, free: int) -> str:
    return f"it takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"


def spread(lengths: Sequence[int], scored: int, computed: int) -> list[tuple[int, int, int]]:
    """Which positions to ask about: (row, start, stop), `scored` in all, the last ones of rows.

    `lengths` are those of the rows, in positions. All of a row before `stop` is computed for them,
    at most `computed` in all. A wrong rotary embedding or window shows late in a row, a wrong
    factor in every row: so it is the ends of some rows.
    """
    if sum(lengths) <= min(scored, computed):
        return [(row, 0, length) for row, length in enumerate(lengths) if length]
    chosen: list[tuple[int, int]] = []
    for row, length in enumerate(lengths):
        others = max(1, min(SEVERAL - len(chosen), len(lengths) - row))
        stop = min(length, computed // others)
        if stop > 0 and len(chosen) * EACH < scored:
            chosen.append((row, stop))
            computed -= stop
    found = []
    for left, (row, stop) in zip(range(len(chosen), 0, -1), chosen, strict=True):
        start = max(0, stop - -(-scored // left))
        found.append((row, start, stop))
        scored -= stop - start
    return [one for one in found if one[1] < one[2]]


def _pieces(
    llama: LlamaCpp, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int, int]]
) -> Iterator[Piece]:
    """llama.cpp's logits of some positions."""
    for row, start, stop in places:
        for scores in llama.scores(rows[row], stop, start=start):
            yield Piece(row, start, scores)
            start += len(scores)
