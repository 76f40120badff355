"""What a GGUF says of itself: its name, its size, its type and the model that it comes from."""

from __future__ import annotations

from qlora_kit.gguf.file import Value
from qlora_kit.gguf.layout import import_gguf
from qlora_kit.gguf.stripping import general_name

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of a file whose matrices are of a type."""
HUB = "https://huggingface.co"


def general(
    base: str, is_hub_id: bool, parameters: int, kind: str, strips: bool
) -> list[tuple[str, Value]]:
    """The keys under `general`, of a model made of `base`: a hub id, or a path, which stays here.

    `parameters` are the numbers in its weights; `strips` is the tokenizer's (`stripping.py`).
    """
    gguf = import_gguf()
    return [
        ("general.type", "model"),
        ("general.name", general_name(base.rstrip("/").rpartition("/")[2], strips)),
        ("general.size_label", gguf.size_label(parameters, parameters, 0, 0)),
        ("general.file_type", FILE_TYPES[kind]),
        ("general.quantization_version", int(gguf.GGML_QUANT_VERSION)),
        *base_model(base, is_hub_id),
    ]


def base_model(base: str, is_hub_id: bool) -> list[tuple[str, Value]]:
    """The keys that name the model that a file comes from, or belongs to; as `general`."""
    owner, _, name = base.rstrip("/").rpartition("/")
    found: list[tuple[str, Value]] = [
        ("general.base_model.count", 1),
        ("general.base_model.0.name", name),
    ]
    if is_hub_id and owner:
        found.append(("general.base_model.0.organization", owner))
        found.append(("general.base_model.0.repo_url", f"{HUB}/{base}"))
    return found
