"""An adapter's directory: its files, each opened once, and what the run that made it says.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qlora_kit.base.contents import find
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RUN_GROUPS
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions, chat_options
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.files.kind import refuse_kind
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.options.option import Options, as_flat
from qlora_kit.options.parsed import make_groups
from qlora_kit.options.yaml_file import read_config
from qlora_kit.run.directory import CONFIG

WRITES_CHATS = {"chat_date", "chat_template_args", "merge_system"}
"""The options that decide, beside the template, how a chat is written."""
ABOUT_CHATS = {*WRITES_CHATS, "train_on"}
"""The options that `chat_options` reads."""
AS_TRAINED = {"instruction_as_chat", "literal_control_tokens"}
"""What a run's rows became text by, and so do others that its adapter is measured on."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's directory, under the name that it was given by."""

    name: str
    files: AdapterFiles

    @staticmethod
    def open(name: str, *, hashed: bool = False) -> SavedAdapter:
        """Open an adapter's files; `hashed`, for who goes on with it. Errors: `AdapterError`."""
        return SavedAdapter(name, read_adapter(name, hashed=hashed))

    @cached_property
    def _written(self) -> dict[str, Any]:
        """The values in config.yaml, not yet checked; none where no run of ours made the adapter.

        Another tool's adapter may hold a config.yaml of its own.
        """
        path = find(self.files.directory, CONFIG, AdapterError)
        if path is None or not self.files.trained_on:
            return {}

        def check(content: bytes) -> None:
            refuse_kind(path, AdapterError, start=content)

        try:
            return read_config(str(path), RUN_GROUPS, check)
        except ConfigError as error:
            raise AdapterError(error.problem, "restore the file, or remove it") from error

    def options(self, *groups: type[Options]) -> dict[str, Any]:
        """What the run that made the adapter says in its config.yaml of these groups of options.

        Options of other groups are not looked at: data that is gone hinders nobody who needs the
        base. Errors: `AdapterError` for what no run writes.
        """
        return self._checked(self._written, groups)

    def _checked(
        self, written: Mapping[str, Any], groups: Sequence[type[Options]]
    ) -> dict[str, Any]:
        try:
            made, _ = make_groups(written, groups)
        except ConfigError as error:
            path = self.files.directory / CONFIG
            raise AdapterError(
                f"{path}: {error.problem}", "restore the file, or remove it"
            ) from error
        held = {name: value for group in made.values() for name, value in as_flat(group).items()}
        return {name: held[name] for name in written if name in held}

    def chat(self) -> ChatOptions:
        """How the run wrote its chats: its variables and its day."""
        own = self.options(DataConfig)
        return chat_options(DataConfig(**own)) if own else NO_OPTIONS

    def chats_alone(self) -> DataConfig | None:
        """The run's options about chats, whatever is wrong with its data; None where it has none.

        Errors: `AdapterError` for what no run writes.
        """
        written = {name: one for name, one in self._written.items() if name in ABOUT_CHATS}
        own = self._checked(written, (DataConfig,))
        return DataConfig(**own) if own else None

    def reads_literally(self) -> bool:
        """Whether the run read control tokens in its rows as characters."""
        return bool(self.options(DataConfig).get("literal_control_tokens"))

    def data(self) -> tuple[DataConfig, int] | None:
        """The data options and the seed that hold out what the run held out, which may be nothing.

        None where it does not say.
        """
        own, training = self.options(DataConfig), self.options(TrainingConfig)
        if "data" not in own:
            return None
        return DataConfig(**own), training.get("seed", TrainingConfig.seed)


def as_trained(
    data: DataConfig, adapters: Sequence[SavedAdapter], given: Collection[str]
) -> DataConfig:
    """Options of other rows that become text as those of all the adapters' runs did.

    A given option stays as it is.
    """
    said = [adapter.options(DataConfig) for adapter in adapters]
    shared: dict[str, Any] = {
        name: True
        for name in AS_TRAINED.difference(given)
        if said and all(options.get(name) for options in said)
    }
    return replace(data, **shared)
