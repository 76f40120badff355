"""Where a run goes on, and whether it is still the run that was saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import CheckpointError, ConfigError
from qlora_kit.files.atomic import real_path
from qlora_kit.options.option import flag_of, types_of
from qlora_kit.options.parsed import closest
from qlora_kit.run.place import finished_record
from qlora_kit.run.reporter import Reporter
from qlora_kit.training.checkpoint import Checkpoint, digest, load_checkpoint, newest
from qlora_kit.training.checkpoint_folder import numbered

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.data.outcome import EncodedRows


FREE_ON_RESUME = {
    # The base and the data are compared by what they hold, the rest changes no number of a run.
    *("model", "revision", "data", "eval_data", "allow_longer_context", "gradient_checkpointing"),
    *("memory_budget", "tiled_mlp"),
    *("offload_embedding", "offload_activations", "offload_base"),
    *("output_dir", "overwrite", "logging_steps", "report_to", "sample_prompts", "compare_bits"),
    *("save_steps", "save_minutes", "save_total_limit", "eval_steps", "early_stopping"),
    *("token_cache", "base_cache", "adapter", "allow_other_base"),
}
FIXED_ON_RESUME = (
    *("lora_r", "target_modules", "optim", "eval_data", "load_best"),
    "adapter_fingerprint",
)
"""What a checkpoint's tensors, or its losses so far, have no other form for."""


def find_checkpoint(config: RunConfig, target_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, verified, and notes on how it was found.

    Errors: `CheckpointError`, `UnsafeInputError`, `ConfigError` where another run's would be lost.
    """
    name = config.output.resume_from_checkpoint
    if name is None:
        return None, []
    if name != "auto":
        path = Path(name).expanduser()
        elsewhere = real_path(path.parent) != real_path(target_dir)
        if elsewhere and numbered(target_dir)[0]:
            raise ConfigError(
                f"--output_dir {target_dir} has checkpoints of its own, and {path} is none of them",
                "go on from them with --resume_from_checkpoint auto, or choose another directory",
            )
        return load_checkpoint(path), []
    found, notes = newest(target_dir)
    if found is None:
        return None, [*notes, f"{target_dir} has no checkpoint: starting from the start"]
    return found, [*notes, f"going on from {found.path}"]


def finished_run(directory: Path) -> Checkpoint:
    """A finished run as what another is compared with: what `run.json` says, and no tensors.

    One of an older version does not say which rows it was trained on: they are not compared.
    Errors: `CheckpointError` for a `run.json` that is damaged.
    """
    record = finished_record(directory)
    places = {
        "model": ("model", "fingerprint"),
        "data": ("data", "fingerprint"),
        "eval_data": ("data", "eval_fingerprint"),
    }
    identity = {
        name: record[part][key] for name, (part, key) in places.items() if key in record[part]
    }
    state = {"config": record["config"], "identity": identity}
    return Checkpoint(directory, record["train"].get("steps", 0), {}, state)


def identity_of(
    base: Base, encoded: EncodedRows, held_out: EncodedRows | None
) -> dict[str, str | None]:
    """What a checkpoint belongs to, by option: hashes of the base and of the encoded rows."""

    def identify(part: EncodedRows) -> str:
        return digest(itertools.chain.from_iterable((r.input_ids, r.labels) for r in part.rows))

    return {
        "model": base.info.fingerprint,
        "data": identify(encoded),
        "eval_data": None if held_out is None else identify(held_out),
    }


def check_resumed(
    config: RunConfig,
    identity: dict[str, str | None],
    resume: Checkpoint,
    overridden: set[str],
    reporter: Reporter,
    *,
    finished: bool = False,
) -> None:
    """Refuse what differs from the checkpoint's run, unless it is named by `--override`.

    Of a `finished` one nothing can be overridden any more; naming what differs is let pass.
    Errors: `ConfigError` with all differences, `CheckpointError` for a checkpoint without them.
    """
    saved, kept = dict(resume.options), resume.state.get("identity")
    if not saved or not isinstance(kept, dict):
        raise CheckpointError(f"{resume.path}: does not say what it is of", "use another one")
    now, names = config.as_flat(), _option_names()
    saved = {names.get(name, name): value for name, value in saved.items()}  # renamed since
    # An option that is newer than the checkpoint counts as left alone there.
    left_alone = {flag_of(field): field.default for field in _option_fields()}
    saved |= {name: left_alone[name] for name in now.keys() - saved.keys()}
    different = {
        name: f"{saved.get(name, 'none')} there, {now.get(name, 'none')} here"
        for name in {**saved, **now}
        if name not in FREE_ON_RESUME and saved.get(name) != now.get(name)
    }
    different |= {
        name: "other contents" for name, value in identity.items() if kept.get(name, value) != value
    }
    refused = {
        name: how
        for name, how in different.items()
        if name not in overridden or name in FIXED_ON_RESUME
    }
    if refused:
        listed = "; ".join(f"{name}: {how}" for name, how in refused.items())
        fixed = [name for name in refused if name in FIXED_ON_RESUME]
        remedy = f"give the same, or --override {','.join(refused)}"
        if finished:
            remedy = "it is finished: give the same, or start a new run in another --output_dir"
        elif fixed:
            remedy = f"start a new run: {', '.join(fixed)} cannot change"
        raise ConfigError(f"{resume.path} is of a run that differs from this one: {listed}", remedy)
    for name, how in different.items():
        reporter.note(f"overridden: {name}: {how}")


def resumed_training(training: TrainingConfig, resume: Checkpoint | None) -> TrainingConfig:
    """The options with the optimizer and the micro-batches of a checkpoint, where they are `auto`.

    What a card had room for when a run began is part of it. Micro-batches that do not fit the steps
    become single rows.
    """
    if resume is None:
        return training
    if training.optim == "auto" and resume.options.get("optim"):
        # Its states are in the checkpoint.
        training = replace(training, optim=resume.options["optim"])
    if training.batch_size is not None:
        return training
    rows = resume.options.get("per_device_train_batch_size")
    steps = resume.options.get("gradient_accumulation_steps")
    if not (isinstance(rows, int) and isinstance(steps, int)) or rows * steps != training.step_rows:
        rows = 1
    return training.in_micro_batches_of(rows)


def overridden_options(config: RunConfig) -> set[str]:
    """The options in `--override` by their main names. Errors: `ConfigError` for unknown ones."""
    names = _option_names()
    if unknown := sorted(config.output.overridden - names.keys()):
        guess = closest(unknown[0], names)
        raise ConfigError(f"override {unknown[0]}: no such option{guess}", "name options of --help")
    return {names[name] for name in config.output.overridden}


def _option_names() -> dict[str, str]:
    """Every name of an option of a run, with its main name."""
    return {
        name: flag_of(field)
        for field in _option_fields()
        for name in (field.name, *field.metadata["option"]["aliases"], flag_of(field))
    }


def _option_fields() -> Iterator[Field[Any]]:
    return itertools.chain.from_iterable(map(fields, types_of(RunConfig).values()))
