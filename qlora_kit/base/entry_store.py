"""Decoder layers streamed from an entry of the base cache, where memory is smaller than the model.

Every tensor is checked once, when the base is loaded; the files that were checked stay open, so
that an entry which is cleared or replaced meanwhile does no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from qlora_kit.base.cache_entry import DamagedError, EntryReader
from qlora_kit.base.kept_base import KeptBase
from qlora_kit.base.layer_store import Places
from qlora_kit.base.tensors import CPU
from qlora_kit.device.found import free_bytes
from qlora_kit.errors import ModelError, ResourceError

REMEDY = "go on with --resume_from_checkpoint auto"
SPARE = 2**31
"""Bytes of the host's memory that are left to the rest of a run."""


class EntryStore:
    """Blocks that are read from an entry's open files each time, and closed with it."""

    waits = True

    def __init__(self, model: nn.Module, entry: EntryReader, layers: Sequence[Places]) -> None:
        self._layers, self._entry = layers, entry
        self._names = {module: name for name, module in model.named_modules()}

    def __del__(self) -> None:
        self._entry.__exit__()

    def load(self, number: int, block: Tensor) -> None:
        """Read a layer's tensors. Errors: `ModelError` for a file that ends early."""
        for place in self._layers[number]:
            name = f"{self._names[place.module]}.{place.name}"
            part = block[place.offset : place.offset + place.nbytes]
            try:
                self._entry.read(name, part, again=True)
            except DamagedError as error:
                raise ModelError(f"{error}, while the base was streamed from it", REMEDY) from error
            except OSError as error:
                path = self._entry.path / self._entry.kept.tensors[name].file
                said = f"{path}: {error.strerror or error} while the base was streamed from it"
                raise ResourceError(said, f"check the disk, then {REMEDY}") from error


def streamed_names(kept: KeptBase, prefix: str | None) -> frozenset[str]:
    """The tensors of an entry that are streamed, of those whose names begin with `prefix`.

    They are those that `layer_store.py` says. None are where there is no prefix.
    """

    def is_streamed(name: str, dimensions: int) -> bool:
        owner, _, leaf = name.rpartition(".")
        return dimensions > (0 if owner in kept.linears and leaf != "bias" else 1)

    return frozenset(
        name
        for name, one in kept.tensors.items()
        if prefix is not None and name.startswith(prefix) and is_streamed(name, len(one.shape))
    )


def is_short_of(kept: KeptBase, names: Collection[str]) -> bool:
    """Whether the host's memory is too small for these tensors of an entry beside all else."""
    size = sum(kept.tensors[name].end - kept.tensors[name].start for name in names)
    return bool(names) and is_too_much(size)


def is_too_much(size: int) -> bool:
    """Whether the host's memory is too small for so many bytes beside all else."""
    return size + SPARE > free_bytes(CPU)
