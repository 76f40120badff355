"""Checkpoints of a run: written so that one exists whole or not at all, and verified when read.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors   the adapter after step N, for anyone
      training.safetensors                             fp32 masters and optimizer states
      state.json                                       everything else, with the format's version
      manifest.json                                    size and SHA-256 of the others, and of itself

It is filled aside, the manifest last, synced, renamed into place, the run's directory synced, and
only then are older ones removed. N optimizer steps are done in it, and no part of another. There
is no pickle. What a file says is checked against its hash, its header and the shapes that the
model and the optimizer have, before anything is taken from it.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base.json_file import read_json
from qlora_kit.base.safetensors_file import read_header
from qlora_kit.errors import CheckpointError, UnsafeInputError
from qlora_kit.files.aside import new_directory
from qlora_kit.files.atomic import check_room, sha256, write_plain

if TYPE_CHECKING:
    # What a directory of a run holds is looked at before torch is imported.
    from torch import Tensor

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "training.safetensors"
PREFIX = "checkpoint-"
SLACK_BYTES = 256 * 1024
"""For JSON, headers and the file system's own blocks."""


@dataclass(frozen=True)
class Checkpoint:
    """What resuming needs: `tensors` by name on the CPU, and `state` as it was handed in."""

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    beside: Callable[[Path], None],
) -> Path:
    """Write `checkpoint-<step>` into the directory of a run; `beside` adds files of its own.

    Errors: `NumericError` for a tensor that is not finite, `ResourceError` where there is no room
    (nothing is left of it then), `OSError`.
    """
    from safetensors.torch import save

    from qlora_kit.base.tensors import check_finite

    for name, tensor in tensors.items():
        check_finite(tensor, f"{PREFIX}{step}: {name}")
    check_room(run, saved_bytes(tensors), f"{PREFIX}{step}")
    path = run / f"{PREFIX}{step}"
    with new_directory(path) as directory:
        beside(directory)
        write_plain(directory / TENSORS, save(dict(tensors)))
        content = {"format": FORMAT, "step": step, **state}
        write_plain(directory / STATE, json.dumps(content, indent=1).encode())
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(directory.iterdir())
        }
        write_plain(directory / MANIFEST, _manifest(files))
    return path


def saved_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Room that a checkpoint of these tensors needs, its adapter file included."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    # The adapter is saved a second time in a dtype of at most the masters' size.
    adapter = sum(size for name, size in sizes.items() if ".lora_" in name)
    return sum(sizes.values()) + adapter + SLACK_BYTES


def prune(run: Path, limit: int, every: int, good: int | None = None) -> bool:
    """Remove all but the `limit` newest checkpoints; whether there was one to remove.

    So many of those planned, at multiples of `every` steps, stay as well: what the clock, a signal
    or an error made between them does not count, for it goes when the run is finished. That of
    step `good` stays: newer ones may be damaged, which nobody looked for.
    """
    found = _own(run)
    planned = [path for path in found if _is_planned(path, every)]
    kept = {*found[:limit], *planned[:limit], run / f"{PREFIX}{good}"}
    older = [path for path in found if path not in kept]
    for path in older:
        _discard(path)
    return bool(older)


def prune_unplanned(run: Path, every: int) -> None:
    """Remove what the clock, a signal or an error made: at steps no multiple of `every`."""
    for path in _own(run):
        if not _is_planned(path, every):
            _discard(path)


def _is_planned(path: Path, every: int) -> bool:
    return bool(every) and int(path.name.removeprefix(PREFIX)) % every == 0


def drop_after(run: Path, step: int) -> None:
    """Remove checkpoints of later steps: a run that went back to `step` leaves that branch."""
    for path in _own(run):
        if int(path.name.removeprefix(PREFIX)) > step:
            _discard(path)


def _own(run: Path) -> list[Path]:
    """The checkpoints that were written whole once, newest first."""
    return [path for path in numbered(run)[0].values() if (path / MANIFEST).is_file()]


def _discard(path: Path) -> None:
    # Out of sight first: a kill in the middle leaves no checkpoint with half of its files.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.rename(path, aside)
    shutil.rmtree(aside)


def numbered(run: Path) -> tuple[dict[int, Path], list[str]]:
    """Directories that are named like checkpoints, newest first, and notes on what only looks so.

    None of them was verified.
    """
    found, notes = {}, []
    for entry in sorted(run.iterdir()) if run.is_dir() else ():
        if not entry.name.startswith(PREFIX):
            continue
        if re.fullmatch(r"0|[1-9]\d{0,17}", entry.name.removeprefix(PREFIX)) is None:
            notes.append(f"{entry} is ignored: not a checkpoint's name")
        elif entry.is_symlink() or not entry.is_dir():
            notes.append(f"{entry} is ignored: not a directory")
        else:
            found[int(entry.name.removeprefix(PREFIX))] = entry
    return dict(sorted(found.items(), reverse=True)), notes


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a run, and notes on what was passed over."""
    found, notes = numbered(run)
    for step, path in found.items():
        try:
            checkpoint = load_checkpoint(path)
        except (CheckpointError, UnsafeInputError) as error:
            notes.append(f"going back before {path.name}: {error.problem}")
        except OSError as error:  # a bad block, or a file that may not be read
            notes.append(f"going back before {path.name}: {error.filename}: {error.strerror}")
        else:
            if checkpoint.step == step:
                return checkpoint, notes
            notes.append(f"{path} is ignored: it stands after step {checkpoint.step}")
    return None, notes


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and read it.

    Errors: `CheckpointError` with the file where one is missing, surplus or changed,
    `UnsafeInputError` for a manifest that names files elsewhere.
    """
    from qlora_kit.base.tensors import read_tensors

    verify(path)
    state = read_json(path / STATE, CheckpointError, limit=64 * 1024**2)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / STATE}: format {state.get('format')!r}, and {FORMAT} is read here",
            "resume with the version of qlora-kit that wrote it",
        )
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"{path / STATE}: step {step!r}", "use another checkpoint")
    entries = read_header(path / TENSORS, CheckpointError)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(entries)}
    return Checkpoint(path, step, tensors, state)


def verify(path: Path) -> None:
    """Compare every file with the manifest, by size and hash. Errors as `load_checkpoint`."""
    remedy = "use an older checkpoint: --resume_from_checkpoint auto finds it"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", "name a checkpoint-N, or auto")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: holds no {MANIFEST}, so it is not complete", remedy)
    content = read_json(path / MANIFEST, CheckpointError)
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        raise CheckpointError(f"{path / MANIFEST}: lists no files", remedy)
    for name in files:
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or "\0" in name:
            raise UnsafeInputError(
                f"{path / MANIFEST}: lists {name!r}, which is no file of its directory", remedy
            )
    if (path / MANIFEST).read_bytes() != _manifest(files):
        raise CheckpointError(f"{path / MANIFEST}: was changed after it was written", remedy)
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if missing := sorted(files.keys() - present):
        raise CheckpointError(f"{path / missing[0]}: is missing", remedy)
    if surplus := sorted(present - files.keys()):
        raise CheckpointError(f"{path / surplus[0]}: is not in the manifest", remedy)
    if needed := sorted({STATE, TENSORS} - files.keys()):
        raise CheckpointError(f"{path / needed[0]}: is not in the manifest", remedy)
    for name, listed in files.items():
        status = os.lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeInputError(f"{path / name}: is not a regular file", remedy)
        if status.st_size != listed.get("size"):
            raise CheckpointError(
                f"{path / name}: has {status.st_size} bytes, and {listed.get('size')} were written",
                remedy,
            )
        if sha256(path / name) != listed.get("sha256"):
            raise CheckpointError(f"{path / name}: its bytes are not those written", remedy)


def take(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The saved tensors of the names in `wanted`, which have its shapes and dtypes.

    Errors: `CheckpointError` naming the first one that is missing or different.
    """
    for name, own in wanted.items():
        saved = tensors.get(name)
        if saved is None or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            found = "missing" if saved is None else f"{list(saved.shape)} {saved.dtype}"
            raise CheckpointError(
                f"{path / TENSORS}: {name} is {found}, expected {list(own.shape)} {own.dtype}",
                "resume with the rank and the targets of the checkpoint",
            )
    return {name: tensors[name] for name in wanted}


def digest(rows: Iterable[Sequence[int]]) -> str:
    """SHA-256 of rows of whole numbers, as an identity of encoded rows."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(array.array("q", (len(row), *row)).tobytes())
    return hashed.hexdigest()


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest's only spelling, so that any changed byte of it shows."""
    body = json.dumps(files, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True).encode()
