"""Quantized bases on disk: made once, then read straight into place.

Quantizing a 7 B model reads 13.5 GB and computes for a minute or more; its 3.6 GiB are read in
seconds. What is kept has an entry of its own (`kept_base.py`) for each source and each setting that
changes a byte, and is used only where the source's files are those that it was made of: their
sizes, times and inodes, which change with every write, and the fingerprint. A source that was
changed, another version of this code, of bitsandbytes or torch, or a damaged file, make it anew.

Keeping is a convenience: what prevents it is said, and the run goes on. Left out: bases that are
in 16 bits or quantized in their files already, and small ones, which are quantized in no time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.cache_entry import EntryWriter, parts_of
from qlora_kit.base.kept_base import (
    KeptBase,
    cache_directory,
    held,
    is_entry,
    mend_cache,
    read_manifest,
    remove_entry,
    remove_left,
)
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.meta_model import tied_names
from qlora_kit.base.resident import make_resident
from qlora_kit.device.target import dtype_name, has_own_memory
from qlora_kit.files.aside import is_being_made, new_directory
from qlora_kit.kernels.encode_cpu import BlockCodes
from qlora_kit.options.checks import size_text

FORMAT = 1
"""Of the entries; another one is not found."""
SMALLEST = 64 * 1024**2
"""Bytes of a quantized base below which it is not kept."""
LEFT_FREE = 4 * 1024**3
"""Bytes of the disk that stay free."""
JUST_NOW = 0.1
"""Seconds within which a file may be written twice and have the same times: ten ticks of a slow
kernel's clock."""
Note = Callable[[str], None]


def silent(text: str) -> None:
    """The `Note` of those whose users need not know."""


@dataclass(frozen=True)
class Wanted:
    """The place of a base's entry, and what the entry has to say to be used."""

    path: Path
    settings: dict[str, Any]
    source: dict[str, Any]
    made_by: dict[str, Any]
    is_fresh: bool = field(compare=False)
    """Whether a file of the source was written just now, and may be again without a trace."""

    def found(self) -> KeptBase | None:
        """The entry; None where there is none, or one of another source or version.

        Errors: `OSError`; `ValueError` for one that is not this user's alone, or is damaged.
        """
        try:
            kept = read_manifest(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        mine = (self.settings, self.source, self.made_by)
        return kept if mine == (kept.settings, kept.source, kept.made_by) else None


def wanted(base: Base) -> Wanted | None:
    """Where a base is kept; None for one that is not."""
    cache, files = cache_directory(), base.files
    if not base.may_be_kept or cache is None or files is None:
        return None
    device = torch.cuda.get_device_name(base.device) if has_own_memory(base.device) else "cpu"
    settings = _as_read(
        {
            **asdict(base.quantization),
            "blocksize": base.quantization.blocksize,
            "dtype": dtype_name(base.dtype),
            "embedding_rows": base.embedding_rows,
            "device": device,
        }
    )
    listed, newest = {}, 0.0
    try:
        for path in sorted({entry.path for entry in base.entries.values()}):
            status = os.stat(path)
            times = status.st_mtime_ns, status.st_ctime_ns
            listed[os.path.relpath(path, base.source.directory)] = [
                status.st_size,
                *times,
                status.st_ino,
            ]
            newest = max(newest, max(times) / 1e9)
    except OSError:  # which reading will tell
        return None
    config = json.dumps(files.decoder.config, sort_keys=True, default=str)
    source = {
        "model": base.source.reference,
        "fingerprint": files.fingerprint,
        "config": _hash(config),
        "files": listed,
    }
    key = _hash(json.dumps([str(base.source.directory.resolve()), settings], sort_keys=True))
    name = re.sub(r"[^\w.-]", "-", base.source.name)[:48].lstrip(".") or "base"
    path = cache / f"{name}-{base.quantization.bits}bit-{key[:16]}"
    is_fresh = abs(time.time() - newest) < JUST_NOW
    return Wanted(path, settings, _as_read(source), _made_by(), is_fresh)


def kept_note(base: Base) -> str | None:
    """That a base will come from the cache, in words; None where it will not."""
    with contextlib.suppress(OSError, ValueError):
        if (place := wanted(base)) is not None and (kept := place.found()) is not None:
            return f"quantized base from the cache ({size_text(kept.nbytes)})"
    return None


def keep(base: Base, before: Wanted, model: PreTrainedModel, note: Note) -> None:
    """Write the entry of a filled base, as which it was `wanted` before it was read.

    `note` is told that, or what prevents it.
    """
    size = sum(nbytes(one) for _, one in parts_of_model(model))
    if size >= SMALLEST:
        write(base, before, parts_of_model(model), size, note)


def write(
    base: Base,
    before: Wanted,
    parts: Iterable[tuple[str, Tensor | QuantizedLinear]],
    size: int,
    note: Note,
) -> None:
    """Write an entry of parts as they come, of which memory holds one; `size` is their bytes."""
    try:
        with contextlib.ExitStack() as done:
            aside = _place(before, size, done)
            with EntryWriter(aside) as writer:
                for name, one in parts:
                    writer.put(name, one)
                if wanted(base) != before or before.is_fresh:
                    raise NotKeptError("its files were written meanwhile")
                own = (base.source.reference, before.settings, before.source, before.made_by)
                writer.finish(functools.partial(KeptBase, *own, time.time()))
    except NotKeptError as why:
        note(f"the quantized base is not kept: {why}")
    except (OSError, ValueError) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or error
        note(f"the quantized base is not kept in {before.path.parent}: {said}")
    else:
        note(f"quantized base kept in the cache for the next start ({size_text(size)})")


class NotKeptError(Exception):
    """Why an entry is not written, in words."""


def discard(before: Wanted, why: object) -> None:
    """Delete an entry whose bytes are not those that were written, and say so."""
    warnings.warn(f"the quantized base in the cache is made again: {why}", stacklevel=2)
    remove(before)


def remove(before: Wanted) -> None:
    """Delete an entry that cannot be used, as far as that is allowed."""
    with contextlib.suppress(OSError, ValueError):
        remove_entry(before.path)


def used(before: Wanted) -> None:
    """Note that an entry was used now; what a killed process left beside it goes."""
    with contextlib.suppress(OSError, ValueError):
        os.utime(before.path)
        remove_left(before.path.parent)


def parts_of_model(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """The tensors of a filled base as `tensors_of` gives them, those that are shared once.

    What is streamed is there until the next one is asked for.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    taken = {f"{name}.{leaf}" for name, layer in linears.items() for leaf in parts_of(layer)}
    for name, layer in linears.items():
        make_resident(layer)
        yield name, layer
    tied = tied_names(model)
    for name in model.state_dict():
        if name not in taken and name not in tied:
            owner, _, leaf = name.rpartition(".")
            make_resident(module := model.get_submodule(owner))
            yield name, getattr(module, leaf).detach()


def nbytes(made: Tensor | QuantizedLinear) -> int:
    """Bytes of a tensor, or of all that an entry has of a quantized linear."""
    tensors = parts_of(made).values() if isinstance(made, QuantizedLinear) else (made,)
    return sum(tensor.nbytes for tensor in tensors)


def _place(before: Wanted, size: int, done: contextlib.ExitStack) -> Path:
    """A folder to fill, which is in the place of the entry when `done` ends well.

    Errors: `NotKeptError`, `OSError`, `ValueError`.
    """
    path = before.path
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path.parent, 0o700)
    with held(path.parent) as cache:
        mend_cache(path.parent)
        if is_being_made(path):
            raise NotKeptError("another process is keeping it")
        stats = os.fstatvfs(cache)
        free = stats.f_bavail * stats.f_frsize
        if free - size < LEFT_FREE:
            raise NotKeptError(
                f"it takes {size_text(size)}, and of the {size_text(free)} that are free in "
                f"{path.parent} {size_text(LEFT_FREE)} stay free"
            )
        if path.is_symlink() or path.is_file():
            path.unlink()
        return done.enter_context(new_directory(path, mode=0o700, is_ours=is_entry))


def _as_read(said: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of it."""
    found: dict[str, Any] = json.loads(json.dumps(said))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@functools.cache
def _made_by() -> dict[str, Any]:
    """The versions of all that decides about the bytes of an entry, our code among it."""
    code = hashlib.sha256()
    for path in code_files():
        code.update(path.read_bytes())
    names = ("bitsandbytes", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"format": FORMAT, "code": code.hexdigest(), **versions}


def code_files() -> list[Path]:
    """The code that decides about the bytes: this folder's, and what makes codes of numbers."""
    return [*sorted(Path(__file__).parent.glob("*.py")), Path(inspect.getfile(BlockCodes))]
