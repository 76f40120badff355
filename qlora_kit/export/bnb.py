"""The writer of checkpoints that bitsandbytes has quantized, in 4 or in 8 bits.

transformers loads them as it loads its own saves of such models. With `--merge_base none` and the
bits of the run the base in them is the one that was trained on, byte for byte, and the adapter lies
beside it. Otherwise weights are quantized, the merged ones or the base's in other bits. That moves
them, maybe further than training did, and `verify` says how far.

What is not quantized (embeddings, head, norms, the linears that `BnbLinears` skips) is in the
dtype of the export. Left out: towers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.bnb_tensors import checkpoint_bytes, quantization_config
from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.config.export import QUANTIZED, ExportConfig
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import ConfigError
from qlora_kit.export.bnb_linears import BnbLinears
from qlora_kit.export.head import head_notes, head_size, is_untied
from qlora_kit.export.hf import write_config
from qlora_kit.export.shards import Piece, numbers, write_shards
from qlora_kit.export.tensors import (
    ExportTensor,
    check_merge_base,
    dtype_of,
    export_tensors,
)
from qlora_kit.lora.inject import lora_layers


def bnb_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export, at most.

    Errors: `ConfigError` where no linear would be quantized, or no file has the weights.
    """
    check_merge_base(base, options.merged_into)
    linears = BnbLinears.of(base, QUANTIZED[options.format])
    if not linears.named:
        raise ConfigError(
            f"format {options.format}: no linear of {base.source.name} would be quantized",
            "use --format hf",
        )
    shapes = [_shape(base, name) for name in linears.named]
    sizes = [checkpoint_bytes(shape, linears.quantization) for shape in shapes]
    size = sum(sum(one.values()) for one in sizes)
    others = base.parameters - sum(shape.numel() for shape in shapes) + head_size(base, options)
    return size + others * DTYPES[dtype_of(base, options)].itemsize


def bnb_notes(base: Base, options: ExportConfig) -> list[str]:
    """What users of the export should know."""
    linears, held = BnbLinears.of(base, QUANTIZED[options.format]), base.quantization.bits
    bits, notes = linears.quantization.bits, head_notes(base, options)
    if options.merged_into != "none":
        notes.append(
            "the merged weights are quantized again, which moves them by more than rounding does; "
            "--merge_base none writes the base as it was trained on, with the adapter beside it"
        )
    elif bits != held:
        notes.append(
            f"the adapter was trained on {held} bits, and its base is quantized to {bits}: another "
            f"base than its own, by as much as the distance says"
        )
    widths = {name.rpartition(".")[2]: _shape(base, name)[1] for name in sorted(linears.named)}
    odd = [f"{name} ({width})" for name, width in widths.items() if width % BLOCKSIZE]
    if bits == 4 and odd:
        notes.append(
            "bitsandbytes (0.50) multiplies wrongly on CPUs with AVX512 where rows are no multiple "
            f"of {BLOCKSIZE}, as of {', '.join(odd)}: on such CPUs use qlora-kit, or --format hf"
        )
    return notes


def write_bnb(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the quantized model in files of `shard_size` bytes, with its config.

    Host memory holds one linear. Errors: `ConfigError`, `NumericError`, `ExportError`,
    `ResourceError`.
    """
    dtype, merged_into = DTYPES[dtype_of(base, options)], options.merged_into
    linears, layers = BnbLinears.of(base, QUANTIZED[options.format]), lora_layers(base.model)
    merged = [] if adapter is None else [n for n, one in layers.items() if adapter in one.lora_A]

    def piece(tensor: ExportTensor) -> Piece:
        if tensor.linear not in linears.named:
            return numbers(tensor, dtype)
        moved = merged_into != "none" and tensor.linear in merged
        unchanged = not moved and merged_into != "original"
        how = {"unchanged": unchanged, "beside_changed": merged_into != "none"}
        make = partial(linears.tensors, base, tensor, dtype, **how)
        sizes = checkpoint_bytes(tensor.shape, linears.quantization)
        names = [tensor.name.removesuffix("weight") + suffix for suffix in sizes]
        return Piece(names, sum(sizes.values()), make)

    untied = is_untied(base, options)
    tensors = export_tensors(base, adapter, merged_into, untied=untied)
    write_shards([piece(one) for one in tensors], directory, options.shard_size)
    files = base.files
    assert files is not None  # its weights were read
    same = base.form.stored and linears.quantization == base.quantization
    stored = files.decoder.config["quantization_config"] if same else None
    said = quantization_config(linears.quantization, dtype, linears.skipped, stored)
    write_config(base, directory, dtype, quantization=said, untied=untied)


def _shape(base: Base, name: str) -> torch.Size:
    linear = base.model.get_submodule(name)
    return torch.Size((linear.out_features, linear.in_features))
