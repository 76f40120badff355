"""A run that goes on training an adapter: what it takes from `--adapter`, and what it refuses.

Rank, scale and targets are the adapter's; so are the base and its bits where they are not given.
Dropout, adapter dtype, data and optimization are free. The SHA-256 of the adapter's weights, which
the run's config.yaml and checkpoints hold, says what it started from. A checkpoint has an adapter
of the same shape beside its masters, so that resuming needs the first one no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.saved_adapter import SavedAdapter, base_of

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.training.checkpoint import Checkpoint

FROM_ADAPTER = {"r": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora"}
"""Fields of `LoRAConfig` that are the adapter's, and their names in PEFT's config."""


@dataclass(frozen=True)
class Start:
    """Where the adapter lies that a run starts from, and whether `--target_modules` was given."""

    directory: Path
    targets_given: bool


def is_gone(config: RunConfig) -> bool:
    """Whether the adapter that a run to resume started from is no longer there."""
    adapter, resumes = config.lora.adapter, config.output.resume_from_checkpoint is not None
    return adapter is not None and resumes and not Path(adapter).exists()


def start_from_adapter(parsed: Parsed, config: RunConfig, run: Path) -> tuple[RunConfig, Start]:
    """The options of a run with those that its `--adapter` decides; `run` is where it writes.

    Where the adapter is gone, the checkpoint to resume says the same of it.
    Errors: `ConfigError` for a flag that contradicts the adapter, and those of its files.
    """
    from qlora_kit.lora.peft_config import WEIGHTS_FILE, read_adapter_config

    assert config.lora.adapter is not None
    directory, lora = Path(config.lora.adapter), config.lora
    checkpoint = _checkpoint(config, run) if is_gone(config) else None
    if checkpoint is not None:
        directory = checkpoint.path
    described = read_adapter_config(directory)
    if checkpoint is None:
        adapter = SavedAdapter.of(str(directory))
        base = base_of(parsed, adapter, as_trained=not lora.allow_other_base)
        found = _sha256(directory / WEIGHTS_FILE)
    else:
        saved = checkpoint.state.get("config")
        saved = saved if isinstance(saved, dict) else {}
        base = _saved_base(parsed, saved)
        found = str(saved.get("adapter_fingerprint"))
    given = parsed.given[LoRAConfig]
    theirs: dict[str, Any] = {
        name: described.get(key) or False for name, key in FROM_ADAPTER.items()
    }
    _refuse_conflicts(lora, given, {**theirs, "adapter_fingerprint": found}, directory)
    dropout = lora.dropout if "dropout" in given else described.get("lora_dropout") or 0.0
    lora = replace(lora, **theirs, dropout=dropout, adapter_fingerprint=found)
    start = Start(directory, "target_modules" in given)
    return replace(config, base=base, lora=lora), start


def _checkpoint(config: RunConfig, run: Path) -> Checkpoint | None:
    """The checkpoint that is to be resumed, if there is one."""
    from qlora_kit.training.checkpoint import load_checkpoint, newest

    name = str(config.output.resume_from_checkpoint)
    return newest(run)[0] if name == "auto" else load_checkpoint(Path(name).expanduser())


def _saved_base(parsed: Parsed, saved: Mapping[str, Any]) -> BaseConfig:
    """The base of a checkpoint's run, below what is given; differences are refused on resuming."""
    known = {one.name: saved[one.name] for one in fields(BaseConfig) if one.name in saved}
    given = {name: getattr(parsed[BaseConfig], name) for name in parsed.given[BaseConfig]}
    return BaseConfig(**{**known, **given})


def _refuse_conflicts(
    lora: LoRAConfig, given: frozenset[str], theirs: Mapping[str, Any], directory: Path
) -> None:
    flags = {one.name: one.metadata["option"]["flag"] or one.name for one in fields(LoRAConfig)}
    conflicts = [name for name in theirs if name in given and getattr(lora, name) != theirs[name]]
    if conflicts:
        said = (
            f"--{flags[name]} {getattr(lora, name)} is given, and {directory} has {theirs[name]}"
            for name in conflicts
        )
        raise ConfigError(
            "; ".join(said), f"leave {', '.join(f'--{flags[name]}' for name in conflicts)} out"
        )


def settle(
    config: RunConfig, base: Base, start: Start, resume: Checkpoint | None
) -> tuple[RunConfig, Path, dict[str, int]]:
    """The options that the shapes decide, where to load from, and the rank of each linear.

    Errors: `AdapterError` for an adapter of another base, `ConfigError` for other targets.
    """
    from qlora_kit.base.tensors import dtype_name
    from qlora_kit.data.chat_template import read_templates
    from qlora_kit.lora.adapter import open_adapter
    from qlora_kit.lora.targets import find_targets, short_names

    lora, data = config.lora, config.data
    # A checkpoint's base is compared with the run's when it is resumed.
    free = lora.allow_other_base or resume is not None
    directory = start.directory if resume is None else resume.path
    opened = open_adapter(base.model, directory, None if free else base.info)
    targets = short_names(base.model, list(opened.modules))
    if start.targets_given:
        asked = lora.target_modules
        if set(find_targets(base.model, asked)) != set(opened.modules):
            shown = asked if isinstance(asked, str) else ",".join(asked)
            raise ConfigError(
                f"--target_modules {shown} is given, and {lora.adapter} adapts "
                f"{', '.join(targets)}",
                "leave --target_modules out",
            )
    else:
        lora = replace(lora, target_modules=tuple(targets))
    if lora.adapter_dtype == "auto":
        lora = replace(lora, adapter_dtype=dtype_name(opened.dtype))
    if data.chat_template is None and read_templates(Path(str(lora.adapter))):
        data = replace(data, chat_template=str(lora.adapter))
    ranks = {name: r for name, (r, _) in opened.modules.items()}
    return replace(config, lora=lora, data=data), directory, ranks


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
