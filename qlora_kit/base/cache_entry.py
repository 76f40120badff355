"""The files of an entry of the base cache: written as tensors come, read straight into place.

A tensor is hashed where it lies once it is read, by the threads that read, so that what is checked
is what is used, and nothing is copied. Each tensor has its own hash: several are read at once, and
one can be read alone (`EntryReader.read`), as a model larger than memory is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qlora_kit.base.head import QuantizedHead
from qlora_kit.base.kept_base import FILE, MANIFEST, KeptBase, KeptTensor, open_entry
from qlora_kit.base.linear import Linear4bit, QuantizedLinear
from qlora_kit.base.safetensors_file import DTYPES, read_header
from qlora_kit.base.tensor_file import TensorFile, tensor_bytes
from qlora_kit.device.host_buffers import HostBuffers, give_pages
from qlora_kit.device.target import has_own_memory
from qlora_kit.files.opened import open_own

SHARD = 2 * 1024**3
"""Bytes of a file, but for the tensor that is beyond."""
HEADER_ROOM = 1024**2
"""Bytes of a file's header; a file ends before it is full."""
NAME_ROOM = 512
"""What a tensor takes of it, at most, beside its name."""
PIECE = 2**20
"""Bytes that are hashed while they are still in the processor's cache."""
ON_THE_WAY = 2**25
"""Bytes that go to a device at once."""
MOST_THREADS = 8
CPU = torch.device("cpu")
PRIVATE = 0o600


class DamagedError(Exception):
    """The bytes of an entry are not those that were written; its text names the file."""


class EntryWriter(ExitStack):
    """Fills an empty directory with the tensors of a quantized base; `finish` writes its manifest.

    Memory holds the tensor that comes. To be used with `with`. Errors: `OSError`.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._files: list[TensorFile] = []
        self._open: TensorFile | None = None
        self._room = 0
        self._hashes: dict[str, str] = {}
        self._linears: dict[str, str] = {}
        self._pool = self.enter_context(ThreadPoolExecutor(1))

    def put(self, name: str, made: Tensor | QuantizedLinear) -> None:
        """Write a tensor, or all of a quantized linear but its bias, which comes as a tensor."""
        if not isinstance(made, QuantizedLinear):
            self._add(name, made)
            return
        packed = made.layer if isinstance(made, QuantizedHead) else made
        self._linears[name] = packed.quant_type if isinstance(packed, Linear4bit) else "int8"
        for leaf, tensor in parts_of(made).items():
            self._add(f"{name}.{leaf}", tensor)

    def finish(self, said: Callable[..., KeptBase]) -> KeptBase:
        """Write the manifest that `said` makes of `tensors`, `linears` and `headers`."""
        if self._open is not None:
            self._open.finish()
        tensors: dict[str, KeptTensor] = {}
        headers: dict[str, tuple[int, str]] = {}
        for file in self._files:
            entries = read_header(file.path)
            for name, one in entries.items():
                where = file.path.name, one.start, one.end
                tensors[name] = KeptTensor(one.dtype, one.shape, *where, self._hashes[name])
            begin = min((one.start for one in entries.values()), default=0)
            with open(file.path, "rb") as written:
                headers[file.path.name] = begin, hashlib.sha256(written.read(begin)).hexdigest()
        made = said(tensors=tensors, linears=self._linears, headers=headers)
        handle = os.open(self._directory / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        with open(handle, "wb") as manifest:
            manifest.write(made.as_json())
        return made

    def _add(self, name: str, tensor: Tensor) -> None:
        needed = len(name.encode("utf-8", "surrogatepass")) * 6 + NAME_ROOM
        file = self._open
        if file is None or self._room < needed or file.nbytes + tensor.nbytes > SHARD:
            if file is not None:
                file.finish()
            path = self._directory / FILE.format(len(self._files) + 1)
            file = self._open = self.enter_context(TensorFile(path, HEADER_ROOM, PRIVATE))
            self._files.append(file)
            self._room = HEADER_ROOM
        self._room -= needed
        held = tensor.detach().to("cpu").contiguous()
        # It is hashed while it is written.
        digest = self._pool.submit(hashlib.sha256, tensor_bytes(held))
        file.add(name, held)
        self._hashes[name] = digest.result().hexdigest()  # and waited for: memory holds one


def parts_of(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of a quantized linear that a file has, by their names in it; not its bias."""
    found: dict[str, Tensor] = {"weight": layer.weight.detach()}
    own = layer._buffers.keys() - layer._non_persistent_buffers_set
    return found | {n: b for n, b in layer._buffers.items() if n in own and b is not None}


class EntryReader(ExitStack):
    """Reads tensors of an entry, each checked; its files stay open until the block ends.

    The directory is opened once: what takes its place meanwhile is not read.
    Errors of opening: `OSError`; `ValueError` for files that are not this user's alone.
    """

    def __init__(self, path: Path, kept: KeptBase) -> None:
        super().__init__()
        self.path, self.kept = path, kept
        self._files: dict[str, BinaryIO] = {}
        folder = open_entry(path)
        try:
            for name in kept.headers:
                self._files[name] = self.enter_context(open_own(name, folder))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(folder)

    def empty(self, name: str, device: torch.device) -> Tensor:
        """A tensor for `read` to fill."""
        one = self.kept.tensors[name]
        dtype: torch.dtype = getattr(torch, DTYPES[one.dtype][0])
        return torch.empty(one.shape, dtype=dtype, device=device)

    def read(self, name: str, into: Tensor, *, again: bool = False) -> None:
        """Fill a tensor of the same bytes with one of the entry, and check it.

        One that is read `again` was checked before, from the same open file.
        Errors: `DamagedError`, and then its numbers are not to be used; `OSError`.
        """
        one = self.kept.tensors[name]
        flat = into.detach().view(-1).view(torch.uint8)
        if flat.numel() != one.end - one.start:
            raise DamagedError(f"{self.path / one.file}: {name} has another size")
        digest = hashlib.sha256()
        hashed: Callable[[memoryview], None] = (lambda part: None) if again else digest.update
        if has_own_memory(flat.device):
            self._through_the_host(one, flat, hashed)
        else:
            if not again:
                # Faults of new pages are most of what reading takes beside hashing. Huge pages
                # were twice as slow, on a virtual machine that gives free memory back.
                give_pages(flat)
            self._hashed(one.file, one.start, flat.numpy().data, hashed)
        if not again and digest.hexdigest() != one.sha256:
            raise DamagedError(f"{self.path / one.file}: {name} is not as it was written")

    def check(self, names: Collection[str]) -> None:
        """Read tensors that are not kept, as many at once as there are threads, and check them.

        Errors: `DamagedError`, `OSError`.
        """
        with self._together() as pool:
            list(pool.map(lambda name: self.read(name, self.empty(name, CPU)), names))

    def read_all(self, into: Mapping[str, Tensor]) -> None:
        """The same of many tensors, several at once, and of the bytes before them.

        Errors: `DamagedError`, `OSError`: then none of the tensors is to be used.
        """
        where = {name: self.kept.tensors[name] for name in into}
        order = sorted(into, key=lambda name: (where[name].file, where[name].start))
        with self._together() as pool:
            jobs = [pool.submit(self._check_header, name) for name in self._files]
            jobs += [pool.submit(self.read, name, into[name]) for name in order]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _together(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))))

    def _check_header(self, name: str) -> None:
        """Check the bytes before the tensors of a file, and that nothing is behind them."""
        size, sha = self.kept.headers[name]
        inside = (one.end for one in self.kept.tensors.values() if one.file == name)
        held, digest = memoryview(bytearray(size)), hashlib.sha256()
        self._hashed(name, 0, held, digest.update)
        whole = os.fstat(self._files[name].fileno()).st_size == max(inside, default=size)
        if digest.hexdigest() != sha or not whole:
            raise DamagedError(f"{self.path / name}: is not as it was written")

    def _hashed(
        self, file: str, start: int, into: memoryview, hashed: Callable[[memoryview], None]
    ) -> None:
        """Read bytes of a file from `start` on; `hashed` is called with each piece of them."""
        handle, done = self._files[file].fileno(), 0
        while done < len(into):
            count = os.preadv(handle, [into[done : done + PIECE]], start + done)
            if not count:
                raise DamagedError(f"{self.path / file}: ended early")
            hashed(into[done : done + count])
            done += count

    def _through_the_host(
        self, one: KeptTensor, flat: Tensor, hashed: Callable[[memoryview], None]
    ) -> None:
        """Read a tensor into memory of a device, piece by piece."""
        buffers = HostBuffers(min(ON_THE_WAY, max(1, flat.numel())), flat.device)
        for begin in range(0, flat.numel(), ON_THE_WAY):
            part = flat[begin : begin + ON_THE_WAY]
            piece = buffers.take()[: part.numel()]
            self._hashed(one.file, one.start + begin, piece.numpy().data, hashed)
            part.copy_(piece, non_blocking=True)
            buffers.sent()
