"""An adapter's files for others, its base under a name that others find.

The weights go along byte by byte, and so do tokenizer and chat template. What only the trainer's
machine has (paths of the base and the data, in config.yaml and run.json) stays behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qlora_kit.base.contents import find, tokenizer_files
from qlora_kit.base.source import is_path
from qlora_kit.errors import AdapterError
from qlora_kit.files.atomic import EXPORT_REPORT, write_file
from qlora_kit.files.kind import refuse_kind
from qlora_kit.files.publish import publish
from qlora_kit.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config

CARD = "README.md"
FOLDER = "adapter"
"""Where an adapter lies beside its base in an export that does not merge them."""
STAYS_BEHIND = " `config.yaml` holds every option, `run.json` every number."
"""What a run's model card says of files that others do not get."""


def public_files(
    adapter: Path, base_name: str | None
) -> tuple[dict[str, Path | bytes], str | None]:
    """What others get of the adapter in `adapter`, by file name, and the name of its base there.

    A file is where it lies, or what it holds where that is not what lies there. `base_name` takes
    the place of the name that it has. Errors: `AdapterError`, `TokenizerError`, `UnsafeInputError`.
    """
    described = dict(read_adapter_config(adapter))
    before = described.get("base_model_name_or_path")
    if base_name is not None and base_name != before:
        described.update(base_model_name_or_path=base_name, revision=None)
    weights, card = find(adapter, WEIGHTS_FILE, AdapterError), find(adapter, CARD, AdapterError)
    assert weights is not None  # its config was read
    files: dict[str, Path | bytes] = {WEIGHTS_FILE: weights, CONFIG_FILE: _json(described)}
    files |= tokenizer_files(adapter)
    for path in (find(adapter, "generation_config.json", AdapterError), card):
        if path is not None:
            refuse_kind(path, AdapterError)
            files[path.name] = path
    if card is not None:
        text = card.read_text(encoding="utf-8", errors="replace").replace(STAYS_BEHIND, "")
        files[CARD] = _renamed(text, base_name).encode()
    said = {"format": "adapter", "merge_base": None, "dtype": None, "base": base_name or before}
    files[EXPORT_REPORT] = _json(said)
    name = described["base_model_name_or_path"]
    return files, None if name is None else str(name)


def export_adapter(adapter: Path, target: Path, base_name: str | None) -> str | None:
    """Write the adapter in `adapter` to `target`; returns the name of its base there.

    `base_name` takes the place of the one that it has. The place was checked.
    Errors: `AdapterError`, `ResourceError`.
    """
    files, name = public_files(adapter, base_name)
    with publish(target) as directory:
        for file, content in files.items():
            place = directory / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                write_file(place, content)
    return name


def is_portable(name: str | None) -> bool:
    """Whether a base's name means the same in every place."""
    return name is not None and not is_path(name)


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _renamed(card: str, base_name: str | None) -> str:
    """A model card with the base under another name, in its head and in its text."""
    key = "\nbase_model: "
    if base_name is None or key not in card.partition("\n---\n")[0]:
        return card
    before = card.partition(key)[2].partition("\n")[0]
    head = card.replace(f"{key}{before}\n", f"{key}{json.dumps(base_name)}\n", 1)
    return head.replace(f"`{before}`", f"`{base_name}`")
