"""The checkpoints in the directory of a run: their names, which are whole, and which go.

Nothing here needs torch: what a directory holds is looked at before it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base.json_file import read_json
from qlora_kit.errors import CheckpointError, UnsafeInputError
from qlora_kit.files.atomic import sha256

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "training.safetensors"
PREFIX = "checkpoint-"


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
    if (path / MANIFEST).read_bytes() != manifest(files):
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


def manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest's only spelling, so that any changed byte of it shows."""
    body = json.dumps(files, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True).encode()
