"""What a command has made, sent to the hub: refused early, sent once it is on disk."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import replace
from pathlib import Path

from qlora_kit.config.export import ExportConfig
from qlora_kit.config.output import HubConfig
from qlora_kit.errors import ConfigError
from qlora_kit.export.adapter_files import is_portable, public_files
from qlora_kit.export.push import check_push, folder_files, push
from qlora_kit.options.parsed import Parsed
from qlora_kit.run.reporter import Reporter

NAMED_LATER = (
    "give its hub id as --model, or send the adapter later with `qlora-kit export --format adapter "
    "--base_name OWNER/NAME --push_to_hub ...`"
)
NAME_IT = "name it for others with --base_name OWNER/NAME"


def is_sent(parsed: Parsed) -> bool:
    """Whether the result of a command is to go to the hub."""
    return parsed[HubConfig].push_to_hub is not None


def check_sending(parsed: Parsed, export_format: str) -> None:
    """Refuse what would keep a result of this format from the hub, and warn of what it replaces.

    Errors: as `check_push`.
    """
    if said := check_push(parsed[HubConfig], export_format):
        warnings.warn(said, stacklevel=2)


def named_as_repository(parsed: Parsed) -> Parsed:
    """The options of an export whose base lies beside its adapter: on the hub it is the repository.

    Errors: `ConfigError` for another name.
    """
    options, repository = parsed[ExportConfig], parsed[HubConfig].push_to_hub
    if repository is None or not options.is_beside:
        return parsed
    if options.base_name not in (None, repository):
        raise ConfigError(
            f"--base_name {options.base_name}: the base lies beside the adapter, in the repository "
            f"{repository}",
            "leave --base_name out",
        )
    named = replace(options, base_name=repository)
    return replace(parsed, groups={**parsed.groups, ExportConfig: named})


def check_base_name(parsed: Parsed, name: str | None, remedy: str = NAMED_LATER) -> None:
    """Refuse to send an adapter whose base others do not find by name. Errors: `ConfigError`."""
    if is_sent(parsed) and not is_portable(name):
        raise ConfigError(
            f"--push_to_hub: the base of the adapter is named by a path of this machine, {name}",
            remedy,
        )


def send_export(parsed: Parsed, directory: Path | None) -> str | None:
    """Send a published export where that is asked for; returns its address. Errors: as `push`."""
    options = parsed[HubConfig]
    if options.push_to_hub is None or directory is None:
        return None
    again = ["hf", "upload", options.push_to_hub, str(directory), "."]
    again += ["--private"] if options.hub_private else []
    return push(options, folder_files(directory), directory, shlex.join(again))


def send_run(parsed: Parsed, directory: Path, reporter: Reporter) -> None:
    """Send the adapter of a finished run where that is asked for. Errors: as `push`."""
    options = parsed[HubConfig]
    if options.push_to_hub is None:
        return
    files, name = public_files(directory, None)
    check_base_name(parsed, name)
    again = ["qlora-kit", "export", "--adapter", str(directory), "--format", "adapter"]
    again += ["--push_to_hub", options.push_to_hub]
    again += [] if options.hub_private else ["--no_hub_private"]
    reporter.sent(push(options, files, directory, f"{shlex.join(again)} --output_dir NEW_DIR"))
