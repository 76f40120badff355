"""Where a run writes: the next free name, what may not be written over, and what is finished."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base.json_file import read_json
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.data.source import local_files
from qlora_kit.errors import CheckpointError, ConfigError
from qlora_kit.files.atomic import check_output
from qlora_kit.files.lock import LOCK
from qlora_kit.run.directory import CONFIG, RESULT, Content, content_of, run_directory
from qlora_kit.training.checkpoint_folder import STATE, numbered, prune_unplanned

if TYPE_CHECKING:
    from qlora_kit.base.base import Base


def output_directory(config: RunConfig, bits: int | None) -> Path:
    """`--output_dir`, else where the checkpoint lies, else the next (or latest) default name."""
    output = config.output
    if output.output_dir is not None:
        return Path(output.output_dir)
    names = default_names(config, bits)
    if output.resume_from_checkpoint is None:
        return next(path for path in names if not path.exists())
    if output.resume_from_checkpoint != "auto":
        return Path(output.resume_from_checkpoint).parent
    taken = list(itertools.takewhile(Path.exists, names))
    return taken[-1] if taken else next(default_names(config, bits))


def default_names(config: RunConfig, bits: int | None) -> Iterator[Path]:
    """runs/<model>-<data>-<bits>bit, then -2, -3 ..."""
    model = Path(config.base.model.rstrip("/")).name
    # Of several files and of patterns what a name may hold, and not too much of it.
    data = re.sub(r"[^\w.+-]+", "-", Path(config.data.data.rstrip("/")).stem.replace(":", "-"))[:60]
    name = f"runs/{model}-{data}-{bits}bit"
    yield Path(name)
    for number in itertools.count(2):
        yield Path(f"{name}-{number}")


def is_finished(config: RunConfig, target_dir: Path, base: Base) -> bool:
    """Whether the run to resume is finished.

    One that is asked for more steps than it took is not. Errors: as `check_place`, and
    `ConfigError` where it is asked for more and has no checkpoint to go on from.
    """
    resume = config.output.resume_from_checkpoint
    if resume is not None and content_of(target_dir) is Content.FINISHED:
        record = finished_record(target_dir)
        saved, steps = record["config"], record["train"].get("steps")
        if (target_dir / LOCK).exists():  # killed after its last word: what it held is let go
            with run_directory(target_dir, overwrite=False):
                prune_unplanned(target_dir, int(saved.get("save_steps") or 0))
        if not _asks_for_more(config, saved, steps):
            return True
        if resume == "auto" and not numbered(target_dir)[0]:
            raise ConfigError(
                f"{target_dir}: this run is finished and kept no checkpoint (save_steps 0), so it "
                "cannot go on to more steps as the same run",
                f"train its adapter on as a new run: --adapter {target_dir} and another "
                "--output_dir, without --resume_from_checkpoint",
            )
    check_place(config, target_dir, base.source.directory)
    return False


def finished_record(directory: Path) -> dict[str, dict[str, Any]]:
    """What a finished run says of itself by part, which is empty where it says nothing.

    Errors: `CheckpointError` for a `run.json` that is damaged.
    """
    found = read_json(directory / RESULT, CheckpointError)
    parts = {name: found.get(name) for name in ("config", "model", "data", "train")}
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def _asks_for_more(config: RunConfig, saved: dict[str, Any], steps: object) -> bool:
    """Whether a command has more steps than the finished run, which may have stopped early."""
    now, epochs = config.training, saved.get("num_train_epochs")
    if now.max_steps is not None:
        more = isinstance(steps, int) and now.max_steps > steps
        return more and now.max_steps != saved.get("max_steps")
    return isinstance(epochs, (int, float)) and now.num_train_epochs > epochs


def check_resumed_place(config: RunConfig, *, unasked: bool) -> None:
    """Refuse a run's directory where a checkpoint is named: which one of it is not said.

    So is a checkpoint of another model or other data than those of `config`, where these are
    `unasked`: the quickstart's. Errors: `ConfigError`, `CheckpointError`.
    """
    name = config.output.resume_from_checkpoint
    if name is None or name == "auto":
        return
    path = Path(name).expanduser()
    run, what = path, "a run"
    if content_of(path) not in (Content.INTERRUPTED, Content.FINISHED):
        if not unasked or not (path / STATE).is_file():
            return
        saved = read_json(path / STATE, CheckpointError, limit=64 * 1024**2).get("config")
        if not isinstance(saved, dict) or not {"model", "data"} <= saved.keys():
            return  # refused when it is resumed
        if (saved.get("model"), saved.get("data")) == (config.base.model, config.data.data):
            return
        run, what = path.parent, f"of a run of {saved.get('model')} on {saved.get('data')}"
    way = f"--output_dir {run} --resume_from_checkpoint {'auto' if run == path else name}"
    if not unasked:
        raise ConfigError(
            f"--resume_from_checkpoint {name} is a run, and no checkpoint",
            f"{way} goes on from its newest one",
        )
    there = (run / CONFIG).is_file()
    raise ConfigError(
        f"--resume_from_checkpoint {name} is {what}, and no --model, --data or --config is given",
        f"go on with --config {run / CONFIG} {way}"
        if there
        else f"go on with the flags that it was started with, and {way}",
    )


def check_place(config: RunConfig, target_dir: Path, model: Path | None) -> None:
    """Refuse a directory that cannot take the results; torch is not needed.

    `model` is the base's directory, where it is known. Errors: `ConfigError`, `ResourceError`.
    """
    resume, content = config.output.resume_from_checkpoint, content_of(target_dir)
    if resume is not None and content is Content.FINISHED:
        return  # nothing will be written over: it is finished, or goes on
    # Of the default names the first that is still free is taken when it is made.
    is_default = resume is None and config.output.output_dir is None
    lies_there = resume is None and content is Content.INTERRUPTED
    if lies_there and not config.output.overwrite and not is_default:
        raise ConfigError(
            f"--output_dir {target_dir} holds a run that was interrupted",
            "go on with --resume_from_checkpoint auto, or give --overwrite",
        )
    goes_on = resume is not None and content is Content.INTERRUPTED
    read = [*([] if model is None else [model]), *_data_files(config.data)]
    if config.lora.adapter is not None:
        read.append(Path(config.lora.adapter))
    check_output(target_dir, config.output.overwrite, read, goes_on or is_default)


def _data_files(data: DataConfig) -> Iterator[Path]:
    """The files here that rows may come from: a run may not be written over them."""
    for name in (data.data, data.eval_data):
        if name:
            yield from (path for path in local_files(name) if path.is_file())
