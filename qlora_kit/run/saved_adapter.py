"""What a command takes from an adapter where it is not given: its base, and the data of its run.

An adapter's files are opened once: `SavedAdapter` holds what they say. Nothing of an adapter or a
base needs torch until the base itself is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_kit.base.checks import look
from qlora_kit.base.checks import read_config as read_model_config
from qlora_kit.base.contents import find
from qlora_kit.base.source import TINY, Source, is_known, is_path, local_path, resolve
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RUN_GROUPS
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.files.atomic import real_path
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.options.names import fields_of
from qlora_kit.options.option import Options, as_flat
from qlora_kit.options.parsed import Parsed, make_groups
from qlora_kit.options.yaml_file import read_config

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.data.chat_template import ChatOptions


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's directory, under the name that it was given by."""

    name: str
    files: AdapterFiles

    @staticmethod
    def of(adapter: SavedAdapter | str) -> SavedAdapter:
        """Open an adapter's files, if they are not open. Errors: `AdapterError`."""
        if isinstance(adapter, SavedAdapter):
            return adapter
        return SavedAdapter(adapter, read_adapter(adapter))

    @cached_property
    def _written(self) -> dict[str, Any]:
        """The values in config.yaml, not yet checked; none where no run of ours made the adapter.

        Another tool's adapter may hold a config.yaml of its own.
        """
        path = find(self.files.directory, "config.yaml", AdapterError)
        if path is None or not self.files.trained_on:
            return {}
        try:
            return read_config(str(path), RUN_GROUPS)
        except ConfigError as error:
            raise AdapterError(error.problem, "restore the file, or remove it") from error

    def options(self, *groups: type[Options]) -> dict[str, Any]:
        """What the run that made the adapter says in its config.yaml of these groups of options.

        Options of other groups are not looked at: data that is gone hinders nobody who needs the
        base. Errors: `AdapterError` for what no run writes.
        """
        try:
            made, _ = make_groups(self._written, groups)
        except ConfigError as error:
            path = self.files.directory / "config.yaml"
            raise AdapterError(
                f"{path}: {error.problem}", "restore the file, or remove it"
            ) from error
        held = {name: value for group in made.values() for name, value in as_flat(group).items()}
        return {name: held[name] for name in self._written if name in held}


def look_at(parsed: Parsed, adapter: SavedAdapter | str | None) -> Source | None:
    """Refuse what paths, JSON and headers show of an adapter and a base; torch is not needed.

    Returns the base, or None where the adapter is yet to be asked for it. Errors: those of the
    files, `AdapterError`.
    """
    if adapter is not None:
        SavedAdapter.of(adapter)
        if "model" not in parsed.given[BaseConfig]:
            return None
    base = parsed[BaseConfig]
    source = resolve(base.model, base.revision, check=read_model_config)
    look(source)
    return source


def open_with_adapter(
    parsed: Parsed,
    adapter: SavedAdapter | str | None,
    allow_other_base: bool,
    *,
    as_trained: bool = False,
) -> Base:
    """The base of a command, and its adapter checked against it; no weight is read. See `base_of`.

    Chat templates that were saved with the adapter are the tokenizer's from here on, and the tokens
    at which it stops the model's.

    Errors: those of the base's files, and `AdapterError`.
    """
    from qlora_kit.base.meta_model import take_generation_config
    from qlora_kit.base.open import open_base
    from qlora_kit.data.chat_template import take_template
    from qlora_kit.lora.adapter import open_adapter

    if adapter is None:
        return open_base(parsed[BaseConfig])
    adapter = SavedAdapter.of(adapter)
    base = open_base(base_of(parsed, adapter, as_trained=as_trained))
    open_adapter(base.model, adapter.files, None if allow_other_base else base.info)
    take_template(base.tokenizer, adapter.files.directory)
    take_generation_config(base.model, adapter.files.directory)
    return base


def base_of(parsed: Parsed, adapter: SavedAdapter, *, as_trained: bool = False) -> BaseConfig:
    """The base options of a command that has an adapter.

    A given flag wins; else the run's config.yaml, the adapter's header and PEFT's config are asked
    in this order. With `as_trained`, a flag that contradicts what the adapter was trained on is a
    `ConfigError`; so is an adapter that names no base where none is given.
    """
    given = {name: getattr(parsed[BaseConfig], name) for name in parsed.given[BaseConfig]}
    config, said = adapter.files.config, adapter.files.trained_on
    run = adapter.options(BaseConfig)
    skip = said.get("skip_modules")
    skip = tuple(skip) if isinstance(skip, list) else skip
    trained: dict[str, Any] = {
        "model": None if "model" in given else _named_base(adapter, run),
        "revision": said.get("revision") or config.get("revision"),
        "bits": said.get("bits"),
        "quant_type": said.get("quant_type"),
        "double_quant": said.get("double_quant"),
        "dtype": said.get("compute_dtype"),
        "resize_embeddings": True if said.get("embedding_rows") else None,
        "skip_modules": skip,
    }
    if as_trained and said:
        for name in ("bits", "quant_type", "double_quant", "skip_modules"):
            if name in given and given[name] != trained[name]:
                raise ConfigError(
                    f"--{name} {given[name]} is given, and {adapter.name} was trained with "
                    f"{name} {trained[name]}",
                    f"leave --{name} out",
                )
    known = {name: value for name, value in trained.items() if value is not None}
    try:
        BaseConfig(**known)
    except ConfigError as error:
        raise AdapterError(
            f"{adapter.name}: says of its base: {error.problem}", "save the adapter again"
        ) from error
    if given.get("bits") not in (None, 4):
        known.pop("quant_type", None)
        known.pop("double_quant", None)
    if given.get("bits") == 16:
        known.pop("skip_modules", None)
    if "model" in given or is_path(known.get("model", "tiny")):
        # The revision belongs to the base that the adapter names, where that is on the hub.
        known.pop("revision", None)
    options = {**known, **given}
    if "model" not in options:
        raise ConfigError(f"{adapter.name} does not say which base it belongs to", "give --model")
    return BaseConfig(**options)


def _named_base(adapter: SavedAdapter, run: Mapping[str, Any]) -> str | None:
    """The base that an adapter names; None where it names none.

    PEFT's config is asked first, for it is what people correct when a base has moved, then the
    run's config.yaml. A path has to be there. A bare name is no hub id: it may be the last part of
    somebody's path, and on the hub another model. The package's own base is where it is now,
    wherever it was installed for training. Errors: `AdapterError`.
    """
    said, named = adapter.files.trained_on, adapter.files.config.get("base_model_name_or_path")
    for name in (named, run.get("model")):
        if not name:
            continue
        if is_path(name):
            path = real_path(local_path(name))
            if path == TINY:
                return "tiny"
            if path.is_dir():
                return str(name)
        elif is_known(name) and ("/" in name or name == run.get("model")):
            return str(name)
    if said.get("name") == "tiny":
        return "tiny"
    for name in (named, run.get("model"), said.get("name")):
        if name:
            raise AdapterError(
                f"{adapter.name} belongs to the base {name}, which is not here",
                "give its directory or hub id as --model",
            )
    return None


def run_chat(adapter: SavedAdapter | str | None) -> ChatOptions:
    """How the run that made an adapter wrote its chats: its variables and its day."""
    from qlora_kit.data.chat_template import NO_OPTIONS, chat_options

    own = {} if adapter is None else SavedAdapter.of(adapter).options(DataConfig)
    return chat_options(DataConfig(**own)) if own else NO_OPTIONS


def reads_literally(adapter: SavedAdapter | str | None) -> bool:
    """Whether the run that made an adapter read control tokens in its rows as characters."""
    own = {} if adapter is None else SavedAdapter.of(adapter).options(DataConfig)
    return bool(own.get("literal_control_tokens"))


def run_data(adapter: SavedAdapter | str) -> tuple[DataConfig, int] | None:
    """The data options and the seed that hold out what an adapter's run held out.

    None where the adapter does not say, or nothing was held out.
    """
    run = SavedAdapter.of(adapter).options(DataConfig, TrainingConfig)
    own = {name: run[name] for name in fields_of((DataConfig,)) if name in run}
    if "data" not in own or own.get("eval_fraction") == 0:
        return None
    return DataConfig(**own), run.get("seed", TrainingConfig.seed)
