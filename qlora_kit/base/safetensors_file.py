"""The one parser of safetensors files: headers to entries, bounded, without overlap or hole.

Nothing is read but the header (8 bytes of its length, then JSON) and what a fingerprint samples;
`tensors.py` reads what the entries describe.

Source: the safetensors format.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base.contents import LIMITS, find, refuse_strays
from qlora_kit.base.json_file import is_deep, read_json, unique
from qlora_kit.base.source import contained
from qlora_kit.errors import InputError, ModelError, UnsafeInputError
from qlora_kit.files.kind import BEGINNING, SAFETENSORS, refuse_kind
from qlora_kit.files.opened import OpenFiles, kept_open

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_LIMIT = 32 * 1024**2  # of the names of 300,000 tensors; the format allows 100 MB
DTYPES = {
    # safetensors' name: torch's name and bytes; torch itself takes a second to import.
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F64": ("float64", 8),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 5

FINGERPRINT_SAMPLE = 4096


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `start` to `end` of `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that torch knows it by."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.dtype][0])
        return found


def read_entries(directory: Path, files: OpenFiles | None = None) -> dict[str, TensorEntry]:
    """Every tensor of a directory by name, from the headers of its safetensors files.

    `files` keeps them open for what else is read of them.
    """
    with kept_open(files) as opened:
        if single := find(directory, SINGLE_FILE):
            return read_header(single, files=opened)
        if index := find(directory, INDEX_FILE):
            return _read_sharded(directory, index, opened)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnsafeInputError(
            f"{directory / pickles[0]}: is a pickle, which can run code when it is read",
            "convert it to safetensors (transformers: save_pretrained) where you trust it",
        )
    refuse_strays(directory)
    raise ModelError(
        f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}", "complete the model directory"
    )


def _read_sharded(directory: Path, path: Path, files: OpenFiles) -> dict[str, TensorEntry]:
    listed = read_json(path, limit=LIMITS[INDEX_FILE]).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise ModelError(f"{path}: has no weight_map of names to files", "fetch the index again")
    by_file: dict[str, list[str]] = {}
    for name, file in sorted(listed.items()):
        by_file.setdefault(file, []).append(name)
    entries: dict[str, TensorEntry] = {}
    for file, keys in sorted(by_file.items()):
        try:
            shard_path = contained(directory, file)
        except ModelError as error:
            raise ModelError(
                f"{error.problem}; the index puts {len(keys)} tensors into it",
                "fetch the missing shard",
            ) from error
        shard = read_header(shard_path, files=files)
        absent = [name for name in keys if name not in shard]
        if absent:
            raise ModelError(
                f"{directory / file}: lacks {some(absent)} of the index", "fetch the shard again"
            )
        surplus = [name for name in shard if listed.get(name) != file]
        if surplus:
            raise ModelError(
                f"{directory / file}: holds {some(surplus)}, which the index does not put there",
                "fetch the index and the shards again",
            )
        entries.update(shard)
    if not entries:
        raise ModelError(f"{path}: lists no tensor", "fetch the index again")
    return entries


def read_header(
    path: Path, error: type[InputError] = ModelError, files: OpenFiles | None = None
) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; offsets cover the data without overlap or hole."""
    return read_whole_header(path, error, files)[0]


def read_whole_header(
    path: Path, error: type[InputError] = ModelError, files: OpenFiles | None = None
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """As `read_header`, and the file's metadata: texts by name, of which nothing is checked."""

    def corrupt(reason: str) -> InputError:
        refuse_kind(path, error, SAFETENSORS, start=start)
        return error(f"{path}: corrupt safetensors: {reason}", "fetch the file again")

    size = path.stat().st_size
    with kept_open(files) as opened:
        file = opened.open(path)
        file.seek(0)
        start = file.read(BEGINNING)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length == 0 or length > min(size - 8, HEADER_LIMIT):
            raise corrupt(f"header of {length} bytes in a file of {size}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as bad:
        raise corrupt(f"header: {bad}") from bad
    if not isinstance(header, dict) or is_deep(header):
        raise corrupt("header is no object, or is nested too deeply")
    begin, entries = 8 + length, []
    for name, described in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(name, described, path, begin)
        if isinstance(entry, str):
            raise corrupt(f"tensor {name[:100]!r}: {entry}")
        entries.append(entry)
    position = begin
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "follows a hole"
            raise corrupt(f"tensor {entry.name[:100]!r} {what}")
        position = entry.end
    if position != size:
        raise corrupt(f"tensors end at byte {position}, the file at {size}")
    metadata = header.get("__metadata__")
    return {entry.name: entry for entry in entries}, metadata if isinstance(metadata, dict) else {}


def _entry(name: str, described: Any, path: Path, begin: int) -> TensorEntry | str:
    """The entry, or what is wrong with its description."""
    if not isinstance(described, Mapping):
        return "no description"
    dtype, shape, span = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {str(dtype)[:60]!r}"
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape) or len(shape) > 8:
        return f"bad shape {str(shape)[:60]}"
    if not isinstance(span, list) or len(span) != 2 or not all(_is_count(n) for n in span):
        return f"bad offsets {str(span)[:60]}"
    expected = math.prod(shape) * DTYPES[dtype][1]
    if span[1] - span[0] != expected:
        return f"{span[1] - span[0]} bytes for {expected}"
    return TensorEntry(name, dtype, tuple(shape), path, begin + span[0], begin + span[1])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # JSON's true is an int, and no count


def some(names: Sequence[str]) -> str:
    """Up to five names, and how many there are."""
    listed = ", ".join(name[:100] for name in names[:SHOWN])
    return f"{len(names)} tensors ({listed}, ...)" if len(names) > SHOWN else listed


def fingerprint(entries: Mapping[str, TensorEntry], files: OpenFiles | None = None) -> str:
    """SHA-256 over every tensor's name, dtype, shape and first, middle and last 4 KiB.

    Sorted by name (the key), so that it is the same however the tensors are spread over files.
    """
    digest = hashlib.sha256()
    with kept_open(files) as opened:
        for name, entry in sorted(entries.items()):
            # Any text is a name in a file; one that no model has is refused later.
            line = f"{name} {entry.dtype} {list(entry.shape)}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
            file = opened.open(entry.path)
            for sample in _samples(file, entry.start, entry.end):
                digest.update(sample)
    return digest.hexdigest()


def _samples(file: io.FileIO, start: int, end: int) -> list[bytes]:
    """The first, middle and last 4 KiB between two places; less than that is read once."""
    rest = max(0, end - start - FINGERPRINT_SAMPLE)
    read = []
    for place in (start, start + rest // 2, start + rest) if rest else (start,):
        file.seek(place)
        read.append(file.read(min(end - start, FINGERPRINT_SAMPLE)))
    return read if rest else read * 3
