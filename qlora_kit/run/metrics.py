"""The numbers of a run on the disk: JSON files, `metrics.jsonl`, and accelerate's trackers.

A file is there whole or not at all: it is written aside, synced and renamed. Metrics are the
exception, a line a step: what a killed run had reached is on disk, and a resumed run drops
the lines after its checkpoint first. JSON has no NaN or infinity; such a number is written as null.

Left out: what the numbers are (the caller measures) and the trackers themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError, excerpt, redacted
from qlora_kit.files.atomic import write_file

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

METRICS_FILE = "metrics.jsonl"
PACKAGES = ("qlora_kit", "torch", "bitsandbytes", "transformers", "accelerate", "safetensors")
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive")},
    **{name: (name,) for name in ("swanlab", "trackio")},
}
"""Accelerate's trackers, and the packages of which each needs one."""


def versions() -> dict[str, str]:
    """The installed versions of Python and of what decides a result; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # qlora_kit itself, run from its source
    return found


class MetricsLog(contextlib.ExitStack):
    """`metrics.jsonl` in `directory`, and the trackers that get the same numbers.

    A new run begins an empty file. With `resume_step`, the whole lines of an earlier part of the
    run up to that step stay and later or torn ones go. Leaving the context finishes the trackers.
    One that fails is a `note`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        trackers: Sequence[GeneralTracker] = (),
        resume_step: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        self._trackers, self._note = list(trackers), note
        for tracker in trackers:
            self.callback(self._carefully, tracker, tracker.finish)
        path = self._path = Path(directory) / METRICS_FILE
        try:
            write_text(path, _lines_up_to(path, resume_step))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            self.callback(os.close, self._file)
        except BaseException:
            self.close()
            raise

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line, then tell the trackers; `step` is the step, if there."""
        line = memoryview((_json(metrics) + "\n").encode("utf-8", errors="backslashreplace"))
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            error.filename = str(self._path)  # the call knows a number only
            raise
        values = {name: value for name, value in metrics.items() if name != "step"}
        for tracker in list(self._trackers):
            log = functools.partial(tracker.log, values, step=metrics.get("step"))
            self._carefully(tracker, log)

    def _carefully(self, tracker: GeneralTracker, call: Callable[[], None]) -> None:
        """A tracker that fails is told no more, and ends no run."""
        if tracker in self._trackers:
            try:
                call()
            except Exception as error:  # each has errors of its own
                self._trackers.remove(tracker)
                name = getattr(tracker, "name", type(tracker).__name__)
                self._note(f"{name} is told no more: {type(error).__name__}: {error}")


def check_plot(name: str | None, overwrite: bool) -> None:
    """Refuse a picture that could not be written; torch is not needed. Errors: `ConfigError`."""
    if name is None:
        return
    path, shown = Path(name), f"--plot {excerpt(name)}"
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"{shown}: is neither a .png nor a .html", "name a file that ends so")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{shown}: matplotlib is not installed", "pip install 'qlora-kit[plots]'")
    if not path.parent.is_dir():
        raise ConfigError(f"{shown}: {path.parent} is no directory", "make it first")
    if os.path.lexists(path) and not (overwrite and path.is_file() and not path.is_symlink()):
        raise ConfigError(f"{shown}: is there already", "name a new file, or give --overwrite")


def check_trackers(report_to: str) -> list[str]:
    """The trackers in `report_to`, each of them installed; nothing of them is imported.

    Errors: `ConfigError` for one that is unknown or not installed.
    """
    names = [name for part in report_to.split(",") if (name := part.strip())]
    if names in ([], ["none"]):
        return []
    available = {name for name, packages in TRACKERS.items() if any(map(_is_installed, packages))}
    if "accelerate.tracking" in sys.modules:  # the user's own code may have registered some
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        available |= LOGGER_TYPE_TO_CLASS.keys() - TRACKERS.keys()
    if missing := [name for name in names if name not in available]:
        known = ", ".join(sorted(available)) or "none is installed"
        raise ConfigError(
            f"report_to: no tracker {', '.join(missing)} here (available: {known})",
            "install its package (pip install tensorboard, wandb, ...) or leave --report_to out",
        )
    return names


def _is_installed(package: str) -> bool:
    # A folder of that name, such as the one that wandb leaves where it runs, is no package.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def start_trackers(
    report_to: str,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    note: Callable[[str], None] = lambda line: None,
) -> Sequence[GeneralTracker]:
    """Accelerate's trackers named in `report_to` (comma-separated), running; none for `none`.

    Those that keep files keep them in `directory`. `config` is stored with them. One that does not
    start is a `note`. Errors: `ConfigError` for one that is unknown or not installed.
    """
    names = check_trackers(report_to)
    if not names:
        return ()
    from accelerate import Accelerator

    # Trackers take plain values only.
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.items()
    }
    started: list[GeneralTracker] = []
    for name in names:
        accelerator = Accelerator(log_with=[name], project_dir=os.fspath(directory))
        try:
            accelerator.init_trackers("qlora-kit", config=plain)
            started += accelerator.trackers
        except Exception as error:  # each has errors of its own: no login, no network, ...
            note(f"{name} does not start and is left out: {type(error).__name__}: {error}")
    return started


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Replace the file with `value` as JSON; numbers that are not finite become null."""
    write_text(path, _json(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file with `text`, all of it or not at all; a new file's mode is the umask's.

    After a failure the old file is there as it was, and nothing beside it.
    """
    # A file name that is not UTF-8 reaches Python as lone surrogates: they are written as \udcXX,
    # which is also how JSON escapes them.
    write_file(Path(path), text.encode("utf-8", errors="backslashreplace"))


def _lines_up_to(path: Path, step: int | None) -> str:
    """The whole lines of a metrics file whose step is not after `step`; nothing for None."""
    if step is None or not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn when the run was killed
        reached = metrics.get("step") if isinstance(metrics, dict) else None
        if isinstance(reached, int) and reached <= step:
            kept.append(line + "\n")
    return "".join(kept)


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(_written(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _written(value: Any) -> Any:
    """`value` in plain containers, a number that is not finite as None, texts without tokens."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
