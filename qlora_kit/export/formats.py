"""The formats of an export: for each what is refused early, who writes it and who reads it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.bnb import bnb_notes, bnb_size, write_bnb
from qlora_kit.export.companions import write_companions
from qlora_kit.export.gguf import gguf_notes
from qlora_kit.export.gguf_check import unread_gguf, verify_gguf
from qlora_kit.export.gguf_lora import lora_notes, lora_size, write_lora
from qlora_kit.export.gguf_lora_check import needs_base, unread_lora, verify_lora
from qlora_kit.export.gguf_quantize import any_gguf_size, write_any_gguf
from qlora_kit.export.hf import hf_notes, hf_size, write_hf
from qlora_kit.export.readers import verify_hf


@dataclass(frozen=True)
class Format:
    """One format. Each function is given the base and the options of the export.

    `size` refuses what cannot be written before a weight is read, and gives the bytes that are.
    `write` writes the base with its adapter in it (None: the base alone) into a directory;
    `companions` adds what others need beside the weights to generate as we do, its last argument
    says whether the chat templates are the adapter's own. `verify` reads it back from there and
    compares it with the model as trained on some rows: what is said of that in export.json, or a
    `NumericError` for what is too far. `notes` is what users of the export should know.
    `needs_base` says whether the weights of the base are read for any of it. `unread` gives the
    reasons why nobody here would read it back, by the readers' names; nothing where one does.
    """

    size: Callable[[Base, ExportConfig], int]
    write: Callable[[Base, str | None, ExportConfig, Path], None]
    verify: Callable[[Base, ExportConfig, Path, Sequence[Encoded]], dict[str, Any]]
    companions: Callable[[Base, Path, bool], None] = write_companions
    notes: Callable[[Base, ExportConfig], Sequence[str]] = lambda base, options: ()
    needs_base: Callable[[Base, ExportConfig], bool] = lambda base, options: True
    unread: Callable[[Base, ExportConfig], Mapping[str, str]] = lambda base, options: {}


def _inside(base: Base, directory: Path, own_templates: bool) -> None:
    """A GGUF has its tokenizer and its templates in it."""


_bnb = Format(bnb_size, write_bnb, verify_hf, notes=bnb_notes)
FORMATS = {
    "hf": Format(hf_size, write_hf, verify_hf, notes=hf_notes),
    "hf-4bit": _bnb,
    "hf-8bit": _bnb,
    "gguf": Format(
        any_gguf_size, write_any_gguf, verify_gguf, _inside, gguf_notes, unread=unread_gguf
    ),
    "gguf-lora": Format(
        lora_size,
        write_lora,
        verify_lora,
        notes=lora_notes,
        needs_base=needs_base,
        unread=unread_lora,
    ),
}
"""The formats that a base is opened for, by the names that `--format` has for them."""
