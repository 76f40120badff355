"""The head of an export whose base was trained on with a quantized one.

As with the linears, what is written is what training multiplied by, dequantized; with
`--merge_base original` it is the exact one. A head that shared its weight with the embedding has
another one now, so a model of it is no tied model any more: its config.json says so, and has both.
Files that cannot say it (a GGUF, whose readers tie by family, and a whole multimodal checkpoint)
keep the exact one, which is the embedding's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.linear import dequantize
from qlora_kit.base.made import grown
from qlora_kit.base.tensors import CPU
from qlora_kit.config.export import ExportConfig


def is_untied(base: Base, options: ExportConfig) -> bool:
    """Whether the export has a head of its own, where the model's files share the embedding's."""
    # The trained head is another tensor than the embedding that it was made of.
    other = base.quantization.head_bits < 16 and base.is_tied and options.merged_into != "original"
    return other and _may_untie(options)


def head_size(base: Base, options: ExportConfig) -> int:
    """Elements of a head that the export has, and the model's files have not."""
    head: Any = base.model.get_output_embeddings()
    return head.out_features * head.in_features if is_untied(base, options) else 0


def head_weight(base: Base, name: str, merge_base: str) -> Tensor:
    """The weight of a quantized head (V, h): as training multiplied by it, or as in the files."""
    key = f"{name}.weight"
    if merge_base == "original":
        return grown(base, key, original_weight(base, key))
    # As a linear's: in 8 bits training multiplies by whole numbers and scales the products.
    dtype = torch.float32 if base.quantization.head_bits == 8 else base.dtype
    return dequantize(base.model.get_output_embeddings(), dtype)  # type: ignore[operator]


def original_weight(base: Base, key: str) -> Tensor:
    """A weight of the files as numbers in fp32."""
    numbers = read_numbers({key: base.entries[key]}, base.form.scaled, torch.float32, CPU)
    # The buffer that the reader lends is used again, so the tensor is copied out of it.
    return next(tensor.clone() for _, tensor in numbers)


def head_notes(base: Base, options: ExportConfig) -> list[str]:
    """What a user should know of the head; nothing where it was trained on in 16 bits."""
    bits = base.quantization.head_bits
    if bits == 16:
        return []
    trained = f"the adapter was trained on a head in {bits} bits"
    if options.merged_into == "original":
        return [f"{trained}, and the export has the original one"]
    if not base.is_tied:
        return [f"{trained}: the export has that, dequantized; --merge_base original has the exact"]
    if not _may_untie(options):
        where = "a GGUF of the base" if options.format == "gguf-lora" else "the export"
        return [f"{trained}: {where} has the exact one, which it shares with the embedding"]
    return [
        f"{trained}, which is no longer the embedding: the export has both, and its config.json "
        "says tie_word_embeddings false; --merge_base original has one, exact, for both"
    ]


def _may_untie(options: ExportConfig) -> bool:
    return not options.format.startswith("gguf") and not options.with_towers
