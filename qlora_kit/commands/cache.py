"""`qlora-kit cache`: the quantized bases that are kept on disk, listed or deleted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.base.kept_base import Listed, cache_directory, listed, remove_entry, remove_left
from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal, size
from qlora_kit.config.commands import CacheConfig
from qlora_kit.errors import ConfigError, ResourceError, excerpt

SUMMARY = "List the quantized bases that are kept on disk, or delete them."


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    options = parse("qlora-kit cache", SUMMARY, (CacheConfig,), argv)[CacheConfig]
    cache = cache_directory()
    if cache is None:
        raise ResourceError("no home directory to keep bases in", "set QLORA_KIT_CACHE to one")
    kept, terminal = _listed(cache), Terminal()
    removed: list[Listed] = []
    if options.clear is not None:
        removed = _chosen(kept, options.clear, cache)
        _remove(cache, removed)
        kept = _listed(cache)
    if options.json:
        said = {"directory": str(cache), "bytes": sum(one.nbytes for one in kept)}
        bases = {"bases": [_as_json(one) for one in kept]}
        gone = {} if options.clear is None else {"removed": [one.path.name for one in removed]}
        terminal.json({**said, **bases, **gone})
        return 0
    for one in removed:
        terminal.line("deleted", f"{one.path.name}, {size(one.nbytes)}")
    _show(kept, cache, terminal)
    return 0


def _listed(cache: Path) -> list[Listed]:
    """What is kept. Errors: `ResourceError`."""
    try:
        return listed(cache)
    except OSError as error:
        raise ResourceError(
            f"{cache}: {error.strerror}", "set QLORA_KIT_CACHE to a directory of yours"
        ) from error


def _chosen(kept: Sequence[Listed], named: str, cache: Path) -> list[Listed]:
    """The entries that a name means. Errors: `ConfigError` where it means none."""
    if named == "all":
        return list(kept)
    chosen = [one for one in kept if named in _names(one)]
    if not chosen:
        names = ", ".join(one.path.name for one in kept) or "nothing"
        raise ConfigError(
            f"clear {excerpt(named)}: no quantized base of that name is kept in {cache}",
            f"name one of those that are there ({names}), or all",
        )
    return chosen


def _names(one: Listed) -> set[str]:
    """What an entry goes by: its own name, and its model's."""
    model = "" if one.said is None else one.said.model
    return {one.path.name, model, Path(model).name} - {""}


def _remove(cache: Path, chosen: Sequence[Listed]) -> None:
    """Delete entries, and what killed processes left. Errors: `ResourceError`."""
    try:
        for one in chosen:
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                remove_entry(one.path)
        remove_left(cache)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or cache}: {error.strerror}", "wait for the process that uses it"
        ) from error
    except ValueError as error:
        raise ResourceError(str(error), "look into it, and delete it by hand") from error


def _show(kept: Sequence[Listed], cache: Path, terminal: Terminal) -> None:
    for one in kept:
        terminal.print((one.path.name, "bold"))
        if one.said is None:
            terminal.print("  is not as it was written: it will not be used")
        else:
            terminal.print(f"  of {one.said.model}: {_settings(one.said.settings)}")
        made = "" if one.said is None else f"made {_day(one.said.made)}, "
        terminal.print(f"  {size(one.nbytes)}, {made}last used {_day(one.last_used)}")
    total = size(sum(one.nbytes for one in kept))
    terminal.line("total", f"{len(kept)} quantized bases, {total}, in {cache}")


def _settings(said: Any) -> str:
    """In which form a base is kept, in words."""
    parts = [f"{said['bits']} bits"]
    if said["quant_type"]:
        parts.append(said["quant_type"] + (" in double quant" if said["double_quant"] else ""))
    parts.append(f"for {said['dtype']}")
    if said.get("head_bits", 16) < 16:
        parts.append(f"head in {said['head_bits']} bits")
    if skipped := said["skip_modules"]:
        parts.append(f"without {skipped if isinstance(skipped, str) else ','.join(skipped)}")
    if said["embedding_rows"]:
        parts.append(f"{said['embedding_rows']} rows of the embedding")
    return ", ".join([*parts, f"made on {said['device']}"])


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _as_json(one: Listed) -> dict[str, Any]:
    said = one.said
    return {
        "name": one.path.name,
        "model": None if said is None else said.model,
        "settings": None if said is None else said.settings,
        "bytes": one.nbytes,
        "made": None if said is None else said.made,
        "last_used": one.last_used,
        "path": str(one.path),
    }
