"""What an export is served with: the command line, and what servers leave out of it."""

from __future__ import annotations

import shlex
from pathlib import Path

from qlora_kit.config.export import ExportConfig
from qlora_kit.export.adapter_files import FOLDER, export_adapter, is_portable
from qlora_kit.gguf.extras import llama_command
from qlora_kit.lora.serving import NOT_PORTABLE, Served, served_beside, vllm_command
from qlora_kit.run.saved_adapter import SavedAdapter


def not_portable(path: str) -> str:
    """The note of a base that is named by a path."""
    return f"{NOT_PORTABLE.format(path)}--base_name OWNER/NAME names it for them"


def export_alone(
    adapter: SavedAdapter, options: ExportConfig, target: Path
) -> tuple[str | None, tuple[str, ...], str | None]:
    """Write an adapter's files; the name of its base there, notes, and what serves it.

    Errors: as `export_adapter`.
    """
    name = export_adapter(adapter.files.directory, target, options.base_name)
    served = Served.of_files(adapter.files)
    notes = [*served.notes()]
    if not is_portable(name):
        notes.append(not_portable(str(name)))
    return name, tuple(notes), vllm_command(served, name or "BASE", target)


def served_model(directory: Path) -> tuple[tuple[str, ...], str]:
    """Notes of an exported model, and what serves it, by the files that are there."""
    said, serve = served_beside(directory, directory / FOLDER)
    if serve is not None:
        return said, serve
    files = sorted(directory.glob("*.gguf"))
    if not files:
        return said, shlex.join(["vllm", "serve", str(directory)])
    return said, shlex.join(llama_command("llama-server", files))
