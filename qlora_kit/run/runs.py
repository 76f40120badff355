"""The runs of a directory: what each was, how far it is, what it gave; two of them side by side.

Everything is read from what runs leave: `run.json` of one that is finished, else the state in the
newest checkpoint and the last line of metrics.jsonl. Nothing is loaded and torch is not imported.
A directory that holds a run's files which cannot be read is listed with what is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.json_file import read_json
from qlora_kit.errors import CheckpointError, DataError, QloraKitError, ResourceError, excerpt
from qlora_kit.files.lock import check_free
from qlora_kit.lora.adapter_files import WEIGHTS_FILE
from qlora_kit.run.directory import RESULT, Content, content_of
from qlora_kit.run.metrics import METRICS_FILE
from qlora_kit.training.checkpoint_folder import STATE, numbered

FINISHED, RUNNING, INTERRUPTED, BROKEN = "finished", "running", "interrupted", "broken"
LAST_BYTES = 64 * 1024
"""Of metrics.jsonl: the end in which its last line is looked for."""
PLACES = frozenset({"output_dir", "overwrite", "resume_from_checkpoint", "override"})
"""Options that say where a run writes, and not what it is."""

TEXTS = frozenset({"name", "state", "options", "problem"})
"""What is no figure of a run."""


@dataclass(frozen=True)
class FoundRun:
    """A run in a directory. What is not known yet, or was never measured, is None.

    Losses are in nats a supervised token of the held-out rows, `last_loss` of the last step's own
    rows. `peak_bytes` are of tensors, `seconds` those of its steps. `options` are those of the run
    by their names; `problem` says what cannot be read.
    """

    name: str
    state: str
    options: Mapping[str, Any]
    steps: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    last_loss: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    trainable_parameters: int | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {**asdict(self), "options": dict(self.options)}


@dataclass(frozen=True)
class Comparison:
    """Two runs: the options that differ, each with both values, and the runs themselves."""

    runs: tuple[FoundRun, FoundRun]
    options: Mapping[str, tuple[Any, Any]]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "runs": [run.as_json() for run in self.runs],
            "options": {name: list(values) for name, values in self.options.items()},
        }


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run gave. Losses are in nats a supervised token; None where nothing was held out.

    `output_dir` is what `load_adapter`, PEFT and the other commands take, `adapter` the file of the
    weights in it. `history` has the numbers of each logged step. The bytes of memory are those of
    tensors by component, `peak` among them. `record` is all of `run.json`.
    """

    output_dir: Path
    adapter: Path
    steps: int
    loss_before: float | None
    loss_after: float | None
    history: tuple[Mapping[str, Any], ...]
    memory_planned: Mapping[str, int]
    memory_measured: Mapping[str, int]
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        """What fits a line: a notebook shows it, and `history` has a line a step."""
        before, after = self.loss_before, self.loss_after
        losses = "" if before is None else f", held-out loss {before:.3f} -> {after:.3f}"
        return f"<RunResult {str(self.output_dir)!r}, {self.steps} steps{losses}>"

    @staticmethod
    def read(directory: Path) -> RunResult:
        """The result in a run's directory. Errors: `CheckpointError` for a broken file."""
        record = read_json(directory / RESULT, CheckpointError)
        held_out, memory = record["eval"] or {}, record["memory"]
        lines = (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        return RunResult(
            output_dir=directory,
            adapter=directory / WEIGHTS_FILE,
            steps=record["train"]["steps"],
            loss_before=held_out.get("loss_before"),
            loss_after=held_out.get("loss_after"),
            history=tuple(json.loads(line) for line in lines),
            memory_planned=memory.get("planned", {}),
            memory_measured=memory["measured"],
            record=record,
        )


def find_runs(directory: Path) -> list[FoundRun]:
    """The runs in `directory`, or the one that it is, the one that was touched last at the end.

    Errors: `DataError` where there is no such directory, or no run in it.
    """
    if not directory.is_dir():
        raise DataError(
            f"--runs_dir {excerpt(str(directory))}: no such directory",
            "name the directory that holds your runs",
        )
    if _is_run(directory):
        return [read_run(directory)]
    inside = [path for path in directory.iterdir() if not path.is_symlink() and _is_run(path)]
    if not inside:
        raise DataError(
            f"--runs_dir {excerpt(str(directory))}: holds no run",
            "a run is a directory with a run.json or with checkpoints: name the one above it",
        )
    inside.sort(key=lambda path: (_touched(path), path.name))
    return [read_run(path) for path in inside]


def compare(directory: Path, names: Sequence[str]) -> Comparison:
    """The two runs of these names in `directory`, or at these paths.

    Errors: `DataError` for what is no run, `CheckpointError` for one that cannot be read.
    """
    found = []
    for name in names:
        path = directory / name
        if not path.is_dir():
            path = Path(name)
        if not path.is_dir() or not _is_run(path):
            raise DataError(
                f"--compare {excerpt(name)}: is no run, neither in {excerpt(str(directory))}",
                "qlora-kit runs lists those that are there",
            )
        if (run := read_run(path)).problem is not None:
            raise CheckpointError(f"--compare {excerpt(name)}: {run.problem}", "compare another")
        found.append(run)
    first, second = found
    names_of_both = sorted((first.options.keys() | second.options.keys()) - PLACES)
    both = {name: (first.options.get(name), second.options.get(name)) for name in names_of_both}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    return Comparison((first, second), differing)


def read_run(path: Path) -> FoundRun:
    """The run in a directory that is one; what cannot be read is its `problem`."""
    name = path.resolve().name
    try:
        if (path / RESULT).exists():
            return _checked(_finished(name, read_json(path / RESULT, CheckpointError)))
        return _checked(_unfinished(name, path))
    except (QloraKitError, OSError) as error:
        said = error.problem if isinstance(error, QloraKitError) else str(error)
        return FoundRun(name, BROKEN, {}, problem=said)
    except (KeyError, TypeError, AttributeError, ValueError):
        return FoundRun(name, BROKEN, {}, problem=f"{path}: its files are not those of a run")


def _checked(run: FoundRun) -> FoundRun:
    """A run whose files say what can be shown. Errors: `TypeError`."""
    figures = {name: one for name, one in vars(run).items() if name not in TEXTS}
    if not isinstance(run.options, Mapping):
        raise TypeError("options are an object")
    if not all(one is None or type(one) in (int, float) for one in figures.values()):
        raise TypeError("figures are numbers")
    return run


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        return False
    content = content_of(path)
    return content is Content.FINISHED or (content is Content.INTERRUPTED and _begun(path))


def _begun(path: Path) -> bool:
    """Whether a run has left more than its lock: one that is starting is listed, too."""
    return any(numbered(path)) or (path / METRICS_FILE).exists() or _is_held(path)


def _touched(path: Path) -> float:
    """When a run was last written to, in seconds; 0 where that cannot be seen."""
    try:
        files = (path / name for name in (RESULT, METRICS_FILE))
        return max((os.stat(one).st_mtime for one in files if one.exists()), default=0.0)
    except OSError:
        return 0.0


def _finished(name: str, record: Mapping[str, Any]) -> FoundRun:
    train, held_out = record["train"], record["eval"] or {}
    return FoundRun(
        name,
        FINISHED,
        record["config"],
        steps=train["steps"],
        loss_before=held_out.get("loss_before"),
        loss_after=held_out.get("loss_after"),
        last_loss=train["last_loss"],
        peak_bytes=record["memory"]["measured"]["peak"],
        seconds=train["seconds"],
        tokens=train["tokens"],
        tokens_per_s=train["tokens_per_s"],
        trainable_parameters=record["model"]["trainable_parameters"],
    )


def _unfinished(name: str, path: Path) -> FoundRun:
    """A run without a result: the state of its newest checkpoint, and the last line of its log."""
    state = RUNNING if _is_held(path) else INTERRUPTED
    saved = next(iter(numbered(path)[0].values()), None)
    kept = {} if saved is None else read_json(saved / STATE, CheckpointError)
    progress, last = kept.get("progress") or {}, _last_line(path / METRICS_FILE)
    seconds, tokens = progress.get("seconds"), progress.get("tokens")
    return FoundRun(
        name,
        state,
        kept.get("config") or {},
        steps=last.get("step", progress.get("step")),
        loss_before=progress.get("loss_before"),
        last_loss=last.get("loss", progress.get("last_loss")),
        seconds=seconds,
        tokens=tokens,
        tokens_per_s=tokens / seconds if seconds and tokens else None,
    )


def _is_held(path: Path) -> bool:
    """Whether a process writes to a run's directory now."""
    try:
        check_free(path)
    except ResourceError:
        return True
    return False


def _last_line(path: Path) -> Mapping[str, Any]:
    """The last whole line of metrics.jsonl; nothing where there is none."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LAST_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):  # what follows the last line end was not written whole
        try:
            said = json.loads(line)
        except ValueError:
            continue
        return said if isinstance(said, dict) else {}
    return {}
