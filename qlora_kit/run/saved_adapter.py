"""What a command takes from an adapter where it is not given: its base, and the data of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.base import DEFAULT_BITS, BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.files.atomic import real_path
from qlora_kit.options.names import fields_of
from qlora_kit.options.option import Options, as_flat
from qlora_kit.options.parsed import Parsed, make_groups
from qlora_kit.options.yaml_file import read_config

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.base.source import Source
    from qlora_kit.data.chat_template import ChatOptions

RUN_GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)


def look_at(parsed: Parsed, adapter: str | None) -> Source | None:
    """Refuse what paths, JSON and headers show of an adapter and a base; torch is not needed.

    Returns the base, or None where the adapter is yet to be asked for it. Errors: those of the
    files, `AdapterError`.
    """
    from qlora_kit.base.checks import look
    from qlora_kit.base.checks import read_config as read_model_config
    from qlora_kit.base.safetensors_file import read_header
    from qlora_kit.base.source import contained, resolve
    from qlora_kit.lora.peft_config import WEIGHTS_FILE, read_adapter_config

    if adapter is not None:
        read_adapter_config(adapter)
        read_header(contained(Path(adapter), WEIGHTS_FILE), AdapterError)
        if "model" not in parsed.given[BaseConfig]:
            return None
    base = parsed[BaseConfig]
    source = resolve(base.model, base.revision, check=read_model_config)
    look(source)
    return source


def open_with_adapter(
    parsed: Parsed,
    adapter: str | None,
    allow_other_base: bool,
    *,
    as_trained: bool = False,
) -> Base:
    """The base of a command, and its adapter checked against it; no weight is read. See `base_of`.

    Chat templates that were saved with the adapter are the tokenizer's from here on, and the tokens
    at which it stops the model's.

    Errors: those of the base's files, and `AdapterError`.
    """
    from qlora_kit.base.architecture import take_generation_config
    from qlora_kit.base.load import open_base
    from qlora_kit.data.chat_template import take_template
    from qlora_kit.lora.adapter import open_adapter

    base = open_base(base_of(parsed, adapter, as_trained=as_trained))
    if adapter is not None:
        open_adapter(base.model, adapter, None if allow_other_base else base.info)
        take_template(base.tokenizer, Path(adapter))
        take_generation_config(base.model, Path(adapter))
    return base


def base_of(parsed: Parsed, adapter: str | None, *, as_trained: bool = False) -> BaseConfig:
    """The base options of a command that may have an adapter.

    A given flag wins; else the run's config.yaml, the adapter's header and PEFT's config are asked
    in this order. With `as_trained`, a flag that contradicts what the adapter was trained on is a
    `ConfigError`; so is an adapter that names no base where none is given.
    """
    given = {name: getattr(parsed[BaseConfig], name) for name in parsed.given[BaseConfig]}
    if adapter is None:
        return parsed[BaseConfig]
    from qlora_kit.base.source import is_path
    from qlora_kit.lora.adapter import trained_on
    from qlora_kit.lora.peft_config import read_adapter_config

    config, said = read_adapter_config(adapter), trained_on(adapter)
    run = run_options(adapter, (BaseConfig,))
    trained: dict[str, Any] = {
        "model": None if "model" in given else _named_base(adapter, config, said, run),
        "revision": said.get("revision") or config.get("revision"),
        "bits": said.get("bits"),
        "quant_type": said.get("quant_type"),
        "double_quant": said.get("double_quant"),
        "dtype": said.get("compute_dtype"),
        "resize_embeddings": True if said.get("embedding_rows") else None,
    }
    if as_trained and said:
        for name in ("bits", "quant_type", "double_quant"):
            if name in given and given[name] != trained[name]:
                raise ConfigError(
                    f"--{name} {given[name]} is given, and {adapter} was trained with "
                    f"{name} {trained[name]}",
                    f"leave --{name} out",
                )
    known = {name: value for name, value in trained.items() if value is not None}
    try:
        BaseConfig(**known)
    except ConfigError as error:
        raise AdapterError(
            f"{adapter}: says of its base: {error.problem}", "save the adapter again"
        ) from error
    if given.get("bits", DEFAULT_BITS) != DEFAULT_BITS:
        known.pop("quant_type", None)
        known.pop("double_quant", None)
    if "model" in given or is_path(known.get("model", "tiny")):
        # The revision belongs to the base that the adapter names, where that is on the hub.
        known.pop("revision", None)
    options = {**known, **given}
    if "model" not in options:
        raise ConfigError(f"{adapter} does not say which base it belongs to", "give --model")
    return BaseConfig(**options)


def _named_base(
    adapter: str, config: Mapping[str, Any], said: Mapping[str, Any], run: Mapping[str, Any]
) -> str | None:
    """The base that an adapter names; None where it names none.

    PEFT's config is asked first, for it is what people correct when a base has moved, then the
    run's config.yaml. A path has to be there. A bare name is no hub id: it may be the last part of
    somebody's path, and on the hub another model. The package's own base is where it is now,
    wherever it was installed for training. Errors: `AdapterError`.
    """
    from qlora_kit.base.source import TINY, is_known, is_path

    named = config.get("base_model_name_or_path")
    for name in (named, run.get("model")):
        if not name:
            continue
        if is_path(name) and real_path(Path(name)) == TINY:
            return "tiny"
        if is_known(name) and (is_path(name) or "/" in name or name == run.get("model")):
            return str(name)
    if said.get("name") == "tiny":
        return "tiny"
    for name in (named, run.get("model"), said.get("name")):
        if name:
            raise AdapterError(
                f"{adapter} belongs to the base {name}, which is not here",
                "give its directory or hub id as --model",
            )
    return None


def run_options(adapter: str, groups: Sequence[type[Options]]) -> dict[str, Any]:
    """What the run that made an adapter says in its config.yaml of these groups of options.

    Options of other groups are not looked at: data that is gone hinders nobody who needs the base.
    Empty where no run of ours made it; another tool's adapter may hold a config.yaml of its own.
    Errors: `AdapterError` for what no run writes.
    """
    from qlora_kit.base.contents import find
    from qlora_kit.lora.adapter import trained_on

    path = find(Path(adapter), "config.yaml", AdapterError)
    if path is None or not trained_on(adapter):
        return {}
    try:
        values = read_config(str(path), RUN_GROUPS)
    except ConfigError as error:
        raise AdapterError(error.problem, "restore the file, or remove it") from error
    try:
        made, _ = make_groups(values, groups)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error.problem}", "restore the file, or remove it") from error
    held = {name: value for group in made.values() for name, value in as_flat(group).items()}
    return {name: held[name] for name in values if name in held}


def run_chat(adapter: str | None) -> ChatOptions:
    """How the run that made an adapter wrote its chats: its variables and its day."""
    from qlora_kit.data.chat_template import NO_OPTIONS, chat_options

    own = {} if adapter is None else run_options(adapter, (DataConfig,))
    return chat_options(DataConfig(**own)) if own else NO_OPTIONS


def reads_literally(adapter: str | None) -> bool:
    """Whether the run that made an adapter read control tokens in its rows as characters."""
    own = {} if adapter is None else run_options(adapter, (DataConfig,))
    return bool(own.get("literal_control_tokens"))


def run_data(adapter: str) -> tuple[DataConfig, int] | None:
    """The data options and the seed that hold out what an adapter's run held out.

    None where the adapter does not say, or nothing was held out.
    """
    run = run_options(adapter, (DataConfig, TrainingConfig))
    own = {name: run[name] for name in fields_of((DataConfig,)) if name in run}
    if "data" not in own or own.get("eval_fraction") == 0:
        return None
    return DataConfig(**own), run.get("seed", TrainingConfig.seed)
