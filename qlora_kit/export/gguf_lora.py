"""The writer of an adapter as llama.cpp reads it: pairs of A and B in a GGUF, with one alpha.

llama.cpp adds `alpha / r * B A x` to what a weight of the base gives: r is the rank of each pair,
alpha one number of the file. So the scale of rsLoRA goes into alpha, ranks of modules need nothing,
and where alphas differ B is multiplied by what its own is above the file's. B has a row for each
output, in the order that llama.cpp has for the weight's (`gguf/layout.py`). The base's weights are
not needed, and the file says which base it is for.

Not written: adapters on the embedding or the head, which share one tensor in many models; they are
refused when the adapter is opened (`lora/targets.py`).
Source: llama.cpp's src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.config.export import LORA_FILE, ExportConfig
from qlora_kit.errors import ExportError, NumericError
from qlora_kit.export.head import head_notes
from qlora_kit.export.tensors import dtype_of, name_of
from qlora_kit.generation.decode import end_ids
from qlora_kit.gguf.file import Fields, FileTensor, write_gguf_file
from qlora_kit.gguf.layout import Layout, import_gguf
from qlora_kit.gguf.metadata import FILE_TYPES, Metadata, base_model, metadata
from qlora_kit.gguf.modelfile import write_modelfile
from qlora_kit.gguf.tensor_types import KINDS
from qlora_kit.lora.inject import ADAPTER, lora_layers

BASE_FILE = "base.gguf"
"""What the base is called in Ollama's file."""
ALPHA = "adapter.lora.alpha"
TRAINED_ON = "qlora_kit.trained_on"
"""The key under which the file says what the header of our adapters does."""
TOLERANCE = {"F32": 1e-6, "F16": 2**-9, "BF16": 2**-6}
"""Of the norm of an update that is read back. Numbers of A and B are each rounded once, by at most
2^-24, 2^-11 and 2^-8 of themselves, but for those below the range of fp16."""


@dataclass(frozen=True)
class Pair:
    """A and B of one linear as training multiplied by them, and what B A is multiplied by."""

    module: str
    a: Tensor
    """(r, in_features), fp32."""
    b: Tensor
    """(out_features, r), fp32."""
    scaling: float

    @property
    def alpha(self) -> float:
        """The alpha that gives its scale at its rank."""
        return self.scaling * self.a.shape[0]


def pairs(base: Base, adapter: str = ADAPTER) -> list[Pair]:
    """The pairs of an adapter of `base.model`, in the model's order."""
    found = []
    for name, layer in lora_layers(base.model).items():
        if adapter in layer.lora_A:
            dtype = layer.adapter_dtypes[adapter]
            a, b = (one.detach().to("cpu", dtype).float() for one in layer.weights(adapter))
            found.append(Pair(name, a, b, layer.scaling[adapter]))
    return found


def beside_model(options: ExportConfig) -> ExportConfig:
    """The options of an adapter's file that lies beside a GGUF of its base."""
    return ExportConfig(
        output_dir=options.output_dir, format="gguf-lora", base_name=options.base_name
    )


def lora_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export as far as they are known; refuses what llama.cpp has not of the base.

    Errors: `ModelError`, `ConfigError`.
    """
    Layout.of(base.model.config)
    _said(base)
    layers = lora_layers(base.model).values()
    return sum(4 * w.numel() for one in layers for name in one.lora_A for w in one.weights(name))


def lora_notes(base: Base, options: ExportConfig) -> Sequence[str]:
    """What a user of the file should know."""
    notes = _said(base).notes
    if where := own_values(base.info.bits):
        notes = (
            *notes,
            f"the adapter is for {where}, which --format gguf --merge_base none writes: on a "
            "GGUF of the original base it is another model",
        )
    if base.is_tied:  # else that GGUF has the head as it was trained on
        notes = (*notes, *head_notes(base, options))
    if base.embedding_rows is None:
        return notes
    return (
        *notes,
        f"the adapter was trained with {base.embedding_rows} embedding rows, a GGUF of the base "
        "has fewer: its new tokens are none there; --format gguf has them",
    )


def own_values(bits: int) -> str:
    """The base on which the adapter is the model as trained; empty where there is no other one."""
    return f"the base's own values in {bits} bits" if bits < 16 else ""


def _said(base: Base) -> Metadata:
    """What a GGUF of the base says of it. Errors: as `metadata`."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    return metadata(base.model.config, rows)


def write_lora(
    base: Base,
    adapter: str | None,
    options: ExportConfig,
    directory: Path,
    model: str = BASE_FILE,
) -> None:
    """Write the adapter into `directory`, and Ollama's file for it on `model` beside it.

    Errors: `ExportError`, `NumericError`, `ModelError`.
    """
    found = [] if adapter is None else pairs(base, adapter)
    if not found:
        raise ExportError("there is no adapter to write", "load one, or export --format gguf")
    layout, kind, alpha = Layout.of(base.model.config), _kind(base, options), common_alpha(found)
    tensors = [one for pair in found for one in _tensors(layout, pair, alpha, kind)]
    fields = _fields(base, options, alpha, kind)
    write_gguf_file(directory / LORA_FILE, layout.facts.architecture, fields, tensors)
    ends, words = end_ids(base.model, base.tokenizer), base.tokenizer
    context, chats = _said(base).context, base.chats
    write_modelfile(directory, words, ends, context, model=model, adapter=LORA_FILE, chats=chats)


def _kind(base: Base, options: ExportConfig) -> str:
    """The type of the file's tensors; auto is F32, which holds an adapter as it was trained."""
    return KINDS[dtype_of(base, options)]


def common_alpha(found: list[Pair]) -> float:
    """The alpha of most pairs, in fp32 as a file has it: their B stay as they are."""
    alphas = Counter(float(np.float32(pair.alpha)) for pair in found)
    return alphas.most_common(1)[0][0]


def _tensors(layout: Layout, pair: Pair, alpha: float, kind: str) -> Iterator[FileTensor]:
    name = f"{layout.name(pair.module)}.weight"
    yield FileTensor(f"{name}.lora_a", pair.a.shape, kind, lambda: pair.a)
    yield FileTensor(f"{name}.lora_b", pair.b.shape, kind, partial(_written_b, layout, pair, alpha))


def _written_b(layout: Layout, pair: Pair, alpha: float) -> Tensor:
    """B in llama.cpp's order of rows, times what its alpha is above the file's."""
    above = 1.0 if float(np.float32(pair.alpha)) == alpha else pair.alpha / alpha
    return layout.rows(pair.module, (pair.b.double() * above).float())


def _fields(base: Base, options: ExportConfig, alpha: float, kind: str) -> Fields:
    """What the file says: what it is, its alpha, and the base that it is for."""
    assert options.output_dir is not None
    name, is_hub_id = name_of(base, options)
    trained_on = base.info.as_dict() | {"name": name}
    return [
        ("general.type", "adapter"),
        ("general.name", Path(options.output_dir).resolve().name),
        ("general.file_type", FILE_TYPES[kind]),
        *base_model(name, is_hub_id),
        ("adapter.type", "lora"),
        (ALPHA, alpha),
        (TRAINED_ON, json.dumps(trained_on)),
    ]


def check_updates(base: Base, options: ExportConfig, directory: Path) -> float:
    """Read the file and compare each update with the trained one; the largest distance.

    A distance is relative, of the whole matrix: |alpha / r * B A - scaling * B A| over the norm of
    the latter; no such matrix is made (`distance`). The package gguf reads the file.
    Errors: `NumericError` for a distance above what rounding explains, `ExportError` for a file
    that has other pairs than the adapter.
    """
    reader, largest = import_gguf().GGUFReader(directory / LORA_FILE), 0.0
    alpha = float(reader.get_field(ALPHA).contents())
    held = {one.name: one for one in reader.tensors}
    layout, kind = Layout.of(base.model.config), _kind(base, options)
    for pair in pairs(base):
        name = f"{layout.name(pair.module)}.weight"
        read = [held.pop(f"{name}.lora_{part}", None) for part in "ab"]
        if None in read:
            raise ExportError(f"{LORA_FILE}: has no {name}.lora_a or .lora_b", "export it again")
        a, b = map(_numbers, read)
        trained = layout.rows(pair.module, pair.b.double()) * pair.scaling, pair.a.double()
        far = distance((b * (alpha / a.shape[0]), a), trained)
        largest = max(largest, far)
        if not far <= TOLERANCE[kind]:
            raise NumericError(
                f"{name}: its update in {LORA_FILE} is {far:.1e} of itself from the trained one",
                "export with --dtype f32",
            )
    if held:
        raise ExportError(
            f"{LORA_FILE}: holds {next(iter(held))} beside the adapter", "export it again"
        )
    return largest


def distance(read: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor]) -> float:
    """|B A - B' A'| / |B' A'| in Frobenius norms of the products of (B, A) and (B', A'), fp64.

    The difference is (B - B') A + B' (A - A'), a product of rank 2r, whose norm is that of the
    (2r, 2r) matrices of its two factors: |P Q|^2 is the sum of (P^T P) * (Q Q^T). Infinite where
    the shapes are not the same.
    """
    (b, a), (other_b, other_a) = read, trained
    if a.shape != other_a.shape or b.shape != other_b.shape:
        return math.inf
    apart = _norm(torch.cat([b - other_b, other_b], 1), torch.cat([a, a - other_a]))
    return apart / (_norm(other_b, other_a) or 1.0)


def _norm(b: Tensor, a: Tensor) -> float:
    """|B A|, the rounding of what is zero left out."""
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(squared) if not squared < 0 else 0.0


def _numbers(tensor: Any) -> Tensor:
    """A tensor that the package gguf has read, in fp64."""
    read = import_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(read, np.float64))
