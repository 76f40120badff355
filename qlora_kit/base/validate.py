"""What a model directory claims, checked before a byte of weights is read.

`read_config` and `read_entries` look at JSON and safetensors headers only; `check_architecture`
compares the headers with the model that the config describes, built on the meta device. Nothing
from a file is believed before: sizes, offsets, shapes, names and paths are all bounded here, so
that loading can trust what it is given.

Source: the safetensors format (8 bytes of header length, a JSON header, then the tensors).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base.contents import LIMITS, find, names_code, tokenizer_files
from qlora_kit.base.families import FAMILIES, check_family, refuse_code
from qlora_kit.base.fields import TOKENS
from qlora_kit.base.json_file import is_deep, read_json, unique
from qlora_kit.base.source import Source, contained, is_path, resolve
from qlora_kit.errors import InputError, ModelError, UnsafeInputError
from qlora_kit.file_kind import SAFETENSORS, refuse_kind
from qlora_kit.files import real_path

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
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LAYER = r"model\.layers\.(\d{1,9})\."
SHOWN = 5


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


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory: a supported family, without code of its own.

    `auto_map` alone is accepted: no file that it names is there, and transformers' own class of
    the family is used. Errors: `ModelError`, `UnsafeInputError`.
    """
    return read_config_file(contained(directory, "config.json"))


def find_config(model: str, revision: str | None = None) -> tuple[Source, Path]:
    """Where a model's config.json is: a file like it, a directory or the hub; nothing else is
    fetched, and torch is not needed. Errors: as `resolve` and `read_config`.
    """
    file = Path(model)
    if is_path(model) and file.is_file() and revision is None:
        name = real_path(file).parent.name if file.name == "config.json" else file.stem
        return Source(name, None, file.parent), file
    source = resolve(model, revision, weights=False, check=read_config)
    return source, source.directory / "config.json"


def read_config_file(path: Path) -> dict[str, Any]:
    """As `read_config`, of a file of any name."""
    config = read_json(path)
    if "auto_map" in config and (
        str(config.get("model_type")) not in FAMILIES or names_code(config["auto_map"], path.parent)
    ):
        raise UnsafeInputError(
            f"{path}: auto_map asks to run Python files of the model",
            "remote code is never run: use a supported family "
            f"({', '.join(FAMILIES)}), without Python files in its directory",
        )
    check_family(config, path)
    return config


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """The generation_config.json of a directory, None without one: its tokens are tokens.

    Errors: `ModelError`, `UnsafeInputError` for code that it asks for.
    """
    path = find(directory, "generation_config.json")
    if path is None:
        return None
    said = read_json(path)
    refuse_code(said, path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not TOKENS.accepts(said.get(name)):
            raise ModelError(
                f"{path}: {name} is {repr(said[name])[:60]}, not a token", "correct or remove it"
            )
    return said


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory by name, from the headers of its safetensors files."""
    if single := find(directory, SINGLE_FILE):
        return read_header(single)
    if index := find(directory, INDEX_FILE):
        return _read_sharded(directory, index)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnsafeInputError(
            f"{directory / pickles[0]}: is a pickle, which can run code when it is read",
            "convert it to safetensors (transformers: save_pretrained) where you trust it",
        )
    raise ModelError(
        f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}", "complete the model directory"
    )


def _read_sharded(directory: Path, path: Path) -> dict[str, TensorEntry]:
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
        shard = read_header(shard_path)
        absent = [name for name in keys if name not in shard]
        if absent:
            raise ModelError(
                f"{directory / file}: lacks {_some(absent)} of the index", "fetch the shard again"
            )
        surplus = [name for name in shard if listed.get(name) != file]
        if surplus:
            raise ModelError(
                f"{directory / file}: holds {_some(surplus)}, which the index does not put there",
                "fetch the index and the shards again",
            )
        entries.update(shard)
    if not entries:
        raise ModelError(f"{path}: lists no tensor", "fetch the index again")
    return entries


def read_header(path: Path, error: type[InputError] = ModelError) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; offsets cover the data without overlap or hole."""

    def corrupt(reason: str) -> InputError:
        refuse_kind(path, error, SAFETENSORS)
        return error(f"{path}: corrupt safetensors: {reason}", "fetch the file again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length == 0 or length > min(size - 8, HEADER_LIMIT):
            raise corrupt(f"header of {length} bytes in a file of {size}")
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
    return {entry.name: entry for entry in entries}


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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def check_layers(
    entries: Mapping[str, TensorEntry], config: Mapping[str, Any], path: os.PathLike[str]
) -> None:
    """Refuse another number of layers in the files than in config.json (`path`).

    Done before the architecture is built, which takes the longer the more layers are promised.
    """
    stored = {int(found[1]) for name in entries if (found := re.match(LAYER, name))}
    said = config.get("num_hidden_layers")
    if said is not None and said != len(stored):
        raise ModelError(
            f"{path}: num_hidden_layers is {said!r}, and the weights hold {len(stored)} layers",
            "fetch the files again, or correct config.json",
        )


def check_architecture(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, torch.Size],
    tied: Mapping[str, str],
    where: os.PathLike[str],
) -> None:
    """Refuse a checkpoint that is not exactly what the architecture asks for.

    `expected`: name to shape; `tied`: names that may be absent, to the name they share. An
    attention table of old checkpoints (`rotary_emb.inv_freq`) is allowed: it is computed.
    Errors: `ModelError` with up to five names.
    """
    problems = []
    missing = [name for name in expected if name not in entries and name not in tied]
    surplus = [name for name in entries if name not in expected and not is_computed(name)]
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if surplus:
        problems.append(f"holds {_some(surplus)}, which the architecture does not have")
    shapes = [
        f"{name} is {list(entries[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != tuple(shape)
    ]
    if shapes:
        more = f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
        problems.append(", ".join(shapes[:SHOWN]) + more)
    kinds = [
        f"{entry.name} is {entry.dtype}"
        for entry in entries.values()
        if entry.name in expected and not entry.dtype.startswith(("F", "BF"))
    ]
    if kinds:
        problems.append(f"{_some(kinds)}, expected floating point")
    if problems:
        raise ModelError(
            f"{where}: the weights do not fit config.json: {'; '.join(problems)}",
            "fetch the files again, or correct config.json",
        )


def is_computed(name: str) -> bool:
    """Whether a stored tensor is one that the model computes by itself."""
    return name.endswith("rotary_emb.inv_freq")


def _some(names: Sequence[str]) -> str:
    """Up to five names, and how many there are."""
    listed = ", ".join(name[:100] for name in names[:SHOWN])
    return f"{len(names)} tensors ({listed}, ...)" if len(names) > SHOWN else listed


def look(source: Source) -> None:
    """Refuse what all files of a directory show but the tensors, in a second: without torch."""
    read_config(source.directory)
    read_entries(source.directory)
    read_generation_config(source.directory)
    tokenizer_files(source.directory)
