"""A model's name to a directory of files, every path contained in it, with a fingerprint of it.

A name is a path if it starts with `.`, `/` or `~`, has other than one `/`, or its first
part is here, whatever it is; `tiny` is the package's own base; anything else is a hub id, or a
short name that stands for one. Files of a directory may not lead out of it. The network is used
only for hub ids.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.base.hub import download
from qlora_kit.errors import ConfigError, InputError, ModelError, UnsafeInputError, redacted

SHORT_NAMES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "tinyllama-1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "gemma2-2b": "google/gemma-2-2b",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
}
TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class Source:
    """Where a base is: the name to show and record, its commit on the hub, and its directory."""

    name: str
    revision: str | None
    directory: Path

    @property
    def is_portable(self) -> bool:
        """Whether the name that was given means the same base in every folder."""
        return self.revision is not None or self.directory == TINY

    @property
    def reference(self) -> str:
        """What finds the base again from any folder: its hub id, or its directory's whole path.

        The last part of a path, or a path from here, would be a hub id somewhere else, and anybody
        may own that name. The package's own base is where it is installed.
        """
        return self.name if self.revision is not None else redacted(str(self.directory.resolve()))


def is_path(name: str) -> bool:
    """Whether a model's name means a local path; it is then never looked up on the hub."""
    if name.startswith((".", "/", "~")) or name.count("/") not in (0, 1):
        return True
    first = name.split("/")[0]
    return os.path.lexists(first) and name not in SHORT_NAMES and name != "tiny"


def is_known(name: str) -> bool:
    """Whether a name says where a model is: a short name, a hub id, or a path that exists."""
    if is_path(name):
        return local_path(name).exists()
    return name == "tiny" or "/" in SHORT_NAMES.get(name, name)


def resolve(
    name: str,
    revision: str | None = None,
    weights: bool = True,
    check: Callable[[Path], object] | None = None,
) -> Source:
    """The directory of a model, downloaded (`weights` or not) where the name is a hub id.

    `check` is called with the directory of a repository once config.json is there, before the
    rest of it is fetched. Errors: its own, `ModelError` where there is no model, `ResourceError`
    where the hub cannot be reached, `ConfigError` for a revision of what has none.
    """
    if revision is not None and (name == "tiny" or is_path(name)):
        raise ConfigError(
            f"revision {revision} is given, and {name} is not on the hub", "leave --revision out"
        )
    if name == "tiny":
        return Source("tiny", None, TINY)
    if is_path(name):
        directory = local_path(name)
        if not directory.exists():
            broken = broken_link(directory)
            raise ModelError(
                f"{name}: no such directory"
                if broken is None
                else f"{name}: is a link to {broken}, where nothing is",
                "give a model directory or a hub id",
            )
        if not directory.is_dir():
            raise ModelError(f"{name}: is a file", "give the directory that holds config.json")
        if not any(directory.iterdir()):
            raise ModelError(f"{name}: is empty", "give the directory that holds config.json")
        return Source(redacted(directory.resolve().name), None, directory)
    hub_id = SHORT_NAMES.get(name, name)
    if not is_known(name):
        known = ", ".join(("tiny", *SHORT_NAMES))
        raise ModelError(
            f"{name}: neither a directory here nor a known short name",
            f"use owner/name for a hub id, ./{name} for a directory, or one of {known}",
        )
    directory = download(hub_id, revision, weights, check)
    return Source(hub_id, directory.name, directory)


def local_path(name: str) -> Path:
    """A name as a path; `~nobody`, which stands for nobody's home, stays as it is."""
    return Path(os.path.expanduser(name))


def broken_link(path: Path) -> Path | None:
    """Where a link that leads to nothing points to; None for what is no link or leads somewhere.

    The link may be the file, or a folder on the way to it.
    """
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return place.readlink()
    return None


def contained(directory: Path, relative: str, error: type[InputError] = ModelError) -> Path:
    """The regular file `relative` of `directory`.

    Errors: `UnsafeInputError` for a path that leaves the directory or is no regular file (nothing
    is opened), `error` where there is no such file, or a link to nothing.
    """
    parts = Path(relative).parts
    if not parts or Path(relative).is_absolute() or ".." in parts or "\0" in relative:
        raise UnsafeInputError(
            f"{directory}: the path {relative[:200]!r} leaves the directory",
            "remove it from the index; files of a model stay in its directory",
        )
    path = directory / relative
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as missing:
        broken = broken_link(path)
        if broken is not None:
            raise error(
                f"{path}: is a link to {broken}, where nothing is",
                "fetch the file again, or remove the link",
            ) from missing
        raise error(f"{path}: no such file", "complete the directory") from missing
    except (OSError, ValueError) as bad:
        # A loop of links, a name too long, a name that is no text.
        raise UnsafeInputError(
            f"{directory}: the path {relative[:200]!r} cannot be followed",
            "replace it by the real file",
        ) from bad
    real, roots = path.resolve(), [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        # The hub's cache keeps a snapshot as links into the repository's own blobs.
        roots.append(directory.resolve().parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise UnsafeInputError(
            f"{path}: links to {real}, outside the model directory",
            "copy the file into the directory",
        )
    if not stat.S_ISREG(mode):
        raise UnsafeInputError(f"{path}: is not a regular file", "replace it by the real file")
    return path
