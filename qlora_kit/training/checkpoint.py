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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.base.json_file import read_json
from qlora_kit.base.safetensors_file import read_header
from qlora_kit.base.tensor_file import write_tensors
from qlora_kit.base.tensors import check_finite, read_tensors
from qlora_kit.errors import CheckpointError, UnsafeInputError
from qlora_kit.files.aside import new_directory
from qlora_kit.files.atomic import check_room, sha256, write_plain
from qlora_kit.training.checkpoint_folder import (
    MANIFEST,
    PREFIX,
    STATE,
    TENSORS,
    manifest,
    numbered,
    verify,
)

FORMAT = 1
SLACK_BYTES = 256 * 1024
"""For JSON, headers and the file system's own blocks."""


@dataclass(frozen=True)
class Checkpoint:
    """What resuming needs: `tensors` by name on the CPU, and `state` as it was handed in."""

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the run by their names, not yet checked; none where it does not say."""
        said = self.state.get("config")
        return said if isinstance(said, dict) else {}


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
    for name, tensor in tensors.items():
        check_finite(tensor, f"{PREFIX}{step}: {name}")
    check_room(run, saved_bytes(tensors), f"{PREFIX}{step}")
    path = run / f"{PREFIX}{step}"
    with new_directory(path) as directory:
        beside(directory)
        write_tensors(directory / TENSORS, tensors.items(), list(tensors))
        content = {"format": FORMAT, "step": step, **state}
        write_plain(directory / STATE, json.dumps(content, indent=1).encode())
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(directory.iterdir())
        }
        write_plain(directory / MANIFEST, manifest(files))
    return path


def saved_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Room that a checkpoint of these tensors needs, its adapter file included."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    # The adapter is saved a second time in a dtype of at most the masters' size.
    adapter = sum(size for name, size in sizes.items() if ".lora_" in name)
    return sum(sizes.values()) + adapter + SLACK_BYTES


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
