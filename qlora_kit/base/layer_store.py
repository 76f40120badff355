"""Where the frozen tensors of decoder layers lie, for layers that are on a device only at times.

The tensors of a layer lie behind each other in one block of bytes, so that a layer comes to the
device in one copy. In `HostStore` the block is host memory, page-locked on CUDA. Where that is
smaller than the model, `EntryStore` reads it from an entry of the base cache, of which every tensor
is checked once, when the base is loaded; the files that were checked stay open, so that an entry
which is cleared or replaced meanwhile does no harm.

Which tensors: weight and scales of quantized linears, and every frozen tensor of two or more
dimensions. Norms, biases and tables are small and stay on the device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_kit.base.cache_entry import DamagedError, EntryReader
from qlora_kit.base.kept_base import KeptBase
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.tensors import CPU
from qlora_kit.device.found import free_bytes
from qlora_kit.errors import ConfigError, ModelError, ResourceError

ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins: the widest loads of kernels, any dtype."""
UNIT = 2**20
"""Bytes of which a block of page-locked memory has a whole number: 1 MiB."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a layer belongs, and where it lies in the layer's block, from `offset`."""

    module: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """The tensor in a block of bytes, flat uint8, as the module holds it."""
        part = block[self.offset : self.offset + self.nbytes]
        return self.held(part.view(self.dtype).view(self.shape))

    def empty(self) -> Tensor:
        """The tensor without memory: whoever reads it gets an error, and no wrong numbers."""
        return self.held(torch.empty(self.shape, dtype=self.dtype, device="meta"))

    def held(self, tensor: Tensor) -> Tensor:
        """The tensor as the module holds it: a frozen parameter, or a buffer."""
        if self.name in self.module._buffers:
            return tensor
        return nn.Parameter(tensor, requires_grad=False)

    @property
    def tensor(self) -> Tensor:
        """What the module has now."""
        held = self.module._buffers if self.name in self.module._buffers else None
        found = self.module._parameters[self.name] if held is None else held[self.name]
        assert found is not None
        return found

    def put(self, tensor: Tensor) -> None:
        """Let the module have a tensor that `held` or `of` gave."""
        # Not setattr, which looks at every kind of attribute first: this is done in every pass.
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = tensor
        else:
            self.module._parameters[self.name] = tensor  # type: ignore[assignment]


Places = tuple[Place, ...]
"""Of one layer, in the order of its block."""


def places_of(layers: Sequence[nn.Module]) -> list[Places]:
    """For each layer the tensors that need not stay on the device.

    Errors: `ConfigError` where layers share one, which then has no place of its own.
    """
    every = [list(_movable(layer)) for layer in layers]
    owners = Counter(id(tensor) for one in every for _, _, tensor in one)
    found = []
    for tensors in every:
        places, offset = list[Place](), 0
        for module, name, tensor in tensors:
            if owners[id(tensor)] > 1:
                raise ConfigError(
                    f"layers of this model share weights ({name} of a {type(module).__name__}): "
                    "they cannot be streamed one by one",
                    "leave --offload_base out, or give it as false",
                )
            places.append(Place(module, name, offset, tensor.shape, tensor.dtype))
            offset += -(-places[-1].nbytes // ALIGNMENT) * ALIGNMENT
        found.append(tuple(places))
    return found


def block_bytes(places: Places) -> int:
    """The bytes of a layer's block."""
    return sum(-(-place.nbytes // ALIGNMENT) * ALIGNMENT for place in places)


def _movable(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad and parameter.dim() > 1:
                yield module, name, parameter
        if isinstance(module, QuantizedLinear):
            for name, buffer in module._buffers.items():
                # The table of double quant is one for all layers; an offset is a number.
                if buffer is not None and name != "nested_map" and buffer.dim():
                    yield module, name, buffer


class Store(Protocol):
    """The blocks of all layers. `waits` says that `load` takes the time of the thread it is in."""

    waits: bool

    def load(self, number: int, block: Tensor) -> None:
        """Fill a block, flat uint8, with the bytes of layer `number`, by the current stream.

        Errors: `ModelError`, `ResourceError`.
        """


class HostStore:
    """Blocks in the host's memory, each in one piece or more, one behind the other."""

    def __init__(self, blocks: Sequence[Sequence[Tensor]], *, waits: bool) -> None:
        self.waits, self._blocks = waits, blocks

    def load(self, number: int, block: Tensor) -> None:
        """Copy a block; from page-locked memory to a device nobody waits for it."""
        for here, there in along(self._blocks[number], block):
            there.copy_(here, non_blocking=True)


def along(
    pieces: Sequence[Tensor], part: Tensor, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of pieces that hold a block together those behind `start`, each with its part of `part`."""
    done = 0
    for piece in pieces:
        here = piece[max(0, start + done) :][: part.numel() - done]
        yield here, part[done : done + here.numel()]
        done, start = done + here.numel(), start - piece.numel()


def piece_sizes(nbytes: int, locked: bool) -> list[int]:
    """Sizes of pieces of host memory for so many bytes.

    torch rounds page-locked memory up to a power of two: so it is asked for powers of two.
    """
    if not locked:
        return [nbytes]
    units = -(-nbytes // UNIT)
    return [UNIT << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]


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
        self._entry.close()

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


def streamed_bytes(layers: Sequence[nn.Module]) -> int:
    """The bytes of the tensors of layers that need not stay on the device."""
    return sum(tensor.nbytes for layer in layers for _, _, tensor in _movable(layer))


def is_short_of(kept: KeptBase, names: Collection[str]) -> bool:
    """Whether the host's memory is too small for these tensors of an entry beside all else."""
    size = sum(kept.tensors[name].end - kept.tensors[name].start for name in names)
    return bool(names) and is_too_much(size)


def is_too_much(size: int, room: int | None = None) -> bool:
    """Whether what the host has free is too little for so many bytes beside all else.

    A plan has its own `room`.
    """
    return size + SPARE > (free_bytes(CPU) if room is None else room)
