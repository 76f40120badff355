"""What a run takes from the adapter that it goes on training, and what it refuses.

Rank, scale and targets are the adapter's; so are the base and its bits where they are not given.
Dropout, adapter dtype, data and optimization are free. The SHA-256 of the adapter's weights, which
the run's config.yaml and checkpoints hold, says what it started from. A checkpoint has an adapter
of the same shape beside its masters, so that resuming needs the first one no more: where it is
gone, the checkpoint says of it what its files would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import dtype_name
from qlora_kit.errors import ConfigError
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.lora.opening import open_adapter
from qlora_kit.lora.targets import find_targets, short_names
from qlora_kit.run.named_base import base_of
from qlora_kit.run.request import RunRequest
from qlora_kit.training.checkpoint import Checkpoint

FROM_ADAPTER = {"r": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora"}
"""Fields of `LoRAConfig` that are the adapter's, and their names in PEFT's config."""


@dataclass(frozen=True)
class Start:
    """What a run begins from: the options of its base and its adapters, and the adapter's files.

    `files` is None for new adapters; `ranks` are those of the adapted linears by name, once the
    files are compared with the base.
    """

    base: BaseConfig
    lora: LoRAConfig
    files: AdapterFiles | None = None
    ranks: Mapping[str, int] | None = None


def start_of(request: RunRequest, resume: Checkpoint | None) -> Start:
    """The options that `--adapter` decides; where it is gone, `resume` says the same of it.

    Errors: `ConfigError` for a flag that contradicts the adapter, and those of its files.
    """
    asked, lora = request.config, request.config.lora
    if lora.adapter is None:
        return Start(asked.base, lora)
    if request.adapter is not None:
        files, where = request.adapter.files, Path(lora.adapter)
        base = base_of(request.parsed, request.adapter, as_trained=not lora.allow_other_base)
        identity = files.sha256
    else:
        where = Path(lora.adapter) if resume is None else resume.path
        files = read_adapter(where)  # or says that it is gone
        saved = {} if resume is None else resume.options
        base = _saved_base(request, saved)
        identity = str(saved.get("adapter_fingerprint"))
    given = request.parsed.given[LoRAConfig]
    theirs: dict[str, Any] = {
        name: files.config.get(key) or False for name, key in FROM_ADAPTER.items()
    }
    theirs["adapter_fingerprint"] = identity
    _refuse_conflicts(lora, given, theirs, where)
    dropout = lora.dropout if "dropout" in given else files.config.get("lora_dropout") or 0.0
    return Start(base, replace(lora, **theirs, dropout=dropout), files)


def _saved_base(request: RunRequest, saved: Mapping[str, Any]) -> BaseConfig:
    """The base of a checkpoint's run, below what is given; differences are refused on resuming."""
    known = {one.name: saved[one.name] for one in fields(BaseConfig) if one.name in saved}
    asked = request.config.base
    given = {name: getattr(asked, name) for name in request.parsed.given[BaseConfig]}
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


def fit_adapter(
    start: Start, base: Base, resume: Checkpoint | None, *, targets_given: bool
) -> Start:
    """The options that the shapes of an adapter decide, and the rank of each linear.

    On resuming the files are those of the checkpoint. Errors: `AdapterError` for an adapter of
    another base, `ConfigError` for other targets.
    """
    lora, files = start.lora, start.files
    if files is None:
        return start
    if resume is not None and resume.path != files.directory:
        files = read_adapter(resume.path)
    # A checkpoint's base is compared with the run's when it is resumed.
    free = lora.allow_other_base or resume is not None
    opened = open_adapter(base.model, files, None if free else base.info)
    targets = short_names(base.model, list(opened.modules))
    asked = lora.target_modules
    if not targets_given:
        lora = replace(lora, target_modules=tuple(targets))
    elif set(find_targets(base.model, asked)) != set(opened.modules):
        shown = asked if isinstance(asked, str) else ",".join(asked)
        raise ConfigError(
            f"--target_modules {shown} is given, and {lora.adapter} adapts {', '.join(targets)}",
            "leave --target_modules out",
        )
    if lora.adapter_dtype == "auto":
        lora = replace(lora, adapter_dtype=dtype_name(opened.dtype))
    return Start(start.base, lora, files, {name: r for name, (r, _) in opened.modules.items()})
