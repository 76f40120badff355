"""Which base and which adapter a command means, and their files, each opened once.

The base is the one that the options name, or the adapter's own. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.base.base_files import BaseFiles, find_base
from qlora_kit.base.source import TINY, is_known, is_path, local_path
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.files.atomic import real_path
from qlora_kit.options.checks import joined
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.saved_adapter import SavedAdapter


@dataclass(frozen=True)
class Named:
    """The options of a command, and the files of the adapter and the base that they name.

    `files` are those of the base, None where the adapter is yet to be asked for it.
    """

    parsed: Parsed
    adapter: SavedAdapter | None
    files: BaseFiles | None

    @staticmethod
    def open(parsed: Parsed, adapter: str | None, *, hashed: bool = False) -> Named:
        """Open and check them; `hashed`, for who goes on training the adapter.

        Errors: those of the files, `AdapterError`.
        """
        saved = None if adapter is None else SavedAdapter.open(adapter, hashed=hashed)
        if saved is not None and "model" not in parsed.given[BaseConfig]:
            return Named(parsed, saved, None)
        base = parsed[BaseConfig]
        return Named(parsed, saved, find_base(base.model, base.revision))


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
                    f"--{name} {joined(given[name])} is given, and {adapter.name} was trained with "
                    f"{name} {joined(trained[name])}",
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
