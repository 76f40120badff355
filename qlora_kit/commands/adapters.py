"""Which base a command loads for an adapter: what was given, else what the adapter says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.commands.arguments import Parsed, read_config
from qlora_kit.config import (
    BaseConfig,
    DataConfig,
    LoRAConfig,
    OutputConfig,
    TrainingConfig,
)
from qlora_kit.errors import ConfigError

RUN_GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)


def run_options(adapter: str) -> dict[str, Any]:
    """The options of the run that made an adapter, from its config.yaml; empty without one."""
    path = Path(adapter) / "config.yaml"
    return read_config(str(path), RUN_GROUPS) if path.is_file() else {}


def base_of(parsed: Parsed, adapter: str | None, *, as_trained: bool = False) -> BaseConfig:
    """The base options of a command that may have an adapter.

    A given flag wins; else the run's config.yaml, the adapter's header and PEFT's config are asked
    in this order. With `as_trained`, a flag that contradicts what the adapter was trained on is a
    `ConfigError`; so is an adapter that names no base where none is given.
    """
    given = {name: getattr(parsed[BaseConfig], name) for name in parsed.given[BaseConfig]}
    if adapter is None:
        return parsed[BaseConfig]
    from qlora_kit.lora.adapter import read_adapter_config, trained_on

    config, said, run = read_adapter_config(adapter), trained_on(adapter), run_options(adapter)
    trained = {
        "model": run.get("model") or said.get("name") or config.get("base_model_name_or_path"),
        "revision": said.get("revision") or config.get("revision"),
        "bits": said.get("bits"),
        "quant_type": said.get("quant_type"),
        "double_quant": said.get("double_quant"),
        "dtype": said.get("compute_dtype"),
    }
    if as_trained:
        for name in ("bits", "quant_type", "double_quant"):
            if name in given and trained["bits"] is not None and given[name] != trained[name]:
                raise ConfigError(
                    f"--{name} {given[name]} is given, and {adapter} was trained with "
                    f"{trained[name]}",
                    f"leave --{name} out",
                )
    known = {name: value for name, value in trained.items() if value is not None}
    if "bits" in given and given["bits"] != 4:
        known.pop("quant_type", None)
        known.pop("double_quant", None)
    options = {**known, **given}
    if "model" not in options:
        raise ConfigError(f"{adapter} does not say which base it belongs to", "give --model")
    return BaseConfig(**options)
