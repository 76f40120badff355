"""Which base and which adapters a command means, and their files, each opened once.

The base is the one that the options name, or the adapters' own. Several have to agree about it:
what one was trained on in 4 bits is another model in 8. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.base.checks import BaseFiles, find_base
from qlora_kit.base.source import TINY, is_known, is_path, local_path
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.files.atomic import real_path
from qlora_kit.options.checks import joined
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.saved_adapter import SavedAdapter


@dataclass(frozen=True)
class Named:
    """The options of a command, and the files of the adapters and the base that they name.

    `files` are those of the base, None where an adapter is yet to be asked for it.
    """

    parsed: Parsed
    adapters: Mapping[str, SavedAdapter]
    files: BaseFiles | None
    allow_other_base: bool = False

    @staticmethod
    def open(
        parsed: Parsed,
        adapters: Mapping[str, str] | str | None,
        *,
        hashed: bool = False,
        allow_other_base: bool = False,
    ) -> Named:
        """Open and check them; `hashed`, for who goes on training the adapter.

        `adapters` are directories by name, or the one that goes by its directory.
        Errors: those of the files; `AdapterError` where adapters do not agree about their base,
        unless `allow_other_base` lets the first one decide.
        """
        if not isinstance(adapters, Mapping):
            adapters = {} if adapters is None else {adapters: adapters}
        saved = {
            name: SavedAdapter.open(directory, hashed=hashed)
            for name, directory in adapters.items()
        }
        if len(saved) > 1 and not allow_other_base:
            _check_agreement(parsed, list(saved.values()))
        if saved and "model" not in parsed.given[BaseConfig]:
            return Named(parsed, saved, None, allow_other_base)
        base = parsed[BaseConfig]
        return Named(parsed, saved, find_base(base.model, base.revision), allow_other_base)

    @property
    def adapter(self) -> SavedAdapter | None:
        """The one that says which base is meant: the first that knows, None without adapters."""
        given = list(self.adapters.values())
        known = (one for one in given if one.files.trained_on)
        return next(known, given[0] if given else None)

    def check_added(self, adapter: SavedAdapter, base: Mapping[str, Any]) -> None:
        """Refuse one more for a base that is held as `base` says, unless a flag has decided that.

        In other bits the base is another model than the adapter's. Errors: `AdapterError`.
        """
        differences = _held_otherwise(adapter, base, self.parsed.given[BaseConfig])
        if differences and not self.allow_other_base:
            raise AdapterError(
                "the adapter was not trained on the base as it is held here: "
                f"{'; '.join(differences)}",
                "start with the flags that are to hold for all, or with --allow_other_base",
            )

    def note_of_form(self, base: Mapping[str, Any]) -> str | None:
        """What to say where a flag decided how the base is held, and adapters were not trained so.

        None where nothing is to be said, or `allow_other_base` has been.
        """
        apart = {name: _held_otherwise(one, base, ()) for name, one in self.adapters.items()}
        said = [f"{name} ({', '.join(how)})" for name, how in apart.items() if how]
        if not said or self.allow_other_base:
            return None
        return (
            f"not trained on the base as it is held here: {', '.join(said)}: "
            f"{'it answers' if len(said) == 1 else 'they answer'} on another model than was trained"
        )


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
        "head_bits": said.get("head_bits", 16) if said else None,
    }
    if as_trained and said:
        for name in ("bits", "quant_type", "double_quant", "skip_modules", "head_bits"):
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
        known.pop("head_bits", None)
    if "model" in given or is_path(known.get("model", "tiny")):
        # The revision belongs to the base that the adapter names, where that is on the hub.
        known.pop("revision", None)
    options = {**known, **given}
    if "model" not in options:
        raise ConfigError(f"{adapter.name} does not say which base it belongs to", "give --model")
    return BaseConfig(**options)


FORM = {
    "bits": "bits",
    "quant_type": "quant_type",
    "double_quant": "double_quant",
    "skip_modules": "skip_modules",
    "head_bits": "head_bits",
}
"""What an adapter's header says of how its base was held, and the flag that decides it for all."""
AGREED = {**FORM, "compute_dtype": "dtype", "embedding_rows": "resize_embeddings"}
"""That, and what else decides the numbers of a base."""
UNSAID = ("skip_modules", "head_bits", "embedding_rows")
"""Of these the ones that mean something where they are absent."""


def _check_agreement(parsed: Parsed, adapters: Sequence[SavedAdapter]) -> None:
    """Refuse adapters of different bases. Errors: `AdapterError` naming two, and what differs."""
    given = parsed.given[BaseConfig]
    for first, other in itertools.combinations(adapters, 2):
        differences = list(_differences(first, other, given))
        if differences:
            raise AdapterError(
                f"{first.name} and {other.name} were not trained on one base: "
                + "; ".join(differences),
                "leave one out, give the flags that are to hold for all, or --allow_other_base",
            )


def _differences(first: SavedAdapter, other: SavedAdapter, given: Collection[str]) -> Iterator[str]:
    """In what the bases of two adapters differ, as far as both say it and no flag decides it."""
    ours, theirs = first.files.trained_on, other.files.trained_on
    yield from _held_apart(ours, theirs, given, AGREED)
    if ours.get("fingerprint") and theirs.get("fingerprint"):
        if ours["fingerprint"] != theirs["fingerprint"]:
            yield f"the weights are those of {ours.get('name')} and of {theirs.get('name')}"
    elif "model" not in given:
        # PEFT's files say a name alone.
        names = [one.files.config.get("base_model_name_or_path") for one in (first, other)]
        if all(names) and len({_place(str(name)) for name in names}) > 1:
            yield f"they name {names[0]} and {names[1]}"


def _held_apart(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    given: Collection[str],
    fields: Mapping[str, str],
) -> Iterator[str]:
    """In which of some fields two bases differ, as far as both say it and no flag decides it."""
    for field, flag in fields.items() if ours and theirs else ():
        values = [ours.get(field), theirs.get(field)]
        # 8 bits have no type; an adapter of either says so with its bits.
        said = field in UNSAID or None not in values
        if said and flag not in given and values[0] != values[1]:
            yield f"{field} {joined(values[0] or 'none')} and {joined(values[1] or 'none')}"


def _held_otherwise(
    adapter: SavedAdapter, base: Mapping[str, Any], given: Collection[str]
) -> list[str]:
    """In what an adapter's base differs from one that is held as `base` says, unless decided."""
    # There is no form of 16 bits.
    fields = FORM if base["bits"] != 16 else {"bits": "bits"}
    return list(_held_apart(adapter.files.trained_on, base, given, fields))


def _place(name: str) -> str:
    """A base by its path, where it is one."""
    return str(real_path(local_path(name))) if is_path(name) else name


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
