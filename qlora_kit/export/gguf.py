"""The writer of GGUF: a whole model in the one file that llama.cpp and Ollama run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.export.head import head_notes
from qlora_kit.export.tensors import ExportTensor, dtype_of, model_tensors, name_of
from qlora_kit.generation.decode import end_ids
from qlora_kit.gguf.file import FileTensor, Value, head_bytes, write_gguf_file
from qlora_kit.gguf.layout import Layout
from qlora_kit.gguf.metadata import general, metadata
from qlora_kit.gguf.modelfile import write_modelfile
from qlora_kit.gguf.tensor_types import KINDS, kind_of
from qlora_kit.gguf.vocabulary import chat_metadata, vocabulary

STEM = "model"


@dataclass(frozen=True)
class GgufFile:
    """A file that is yet to be written: its name, what it says and holds, what to know of it, and
    the `context` up to which llama.cpp computes the same, in tokens.
    """

    name: str
    architecture: str
    fields: list[tuple[str, Value]]
    tensors: list[FileTensor]
    notes: tuple[str, ...]
    context: int

    @property
    def nbytes(self) -> int:
        """Its size, to within a few bytes a tensor."""
        return head_bytes(self.fields, self.tensors) + sum(one.nbytes for one in self.tensors)


def gguf_file(base: Base, adapter: str | None, options: ExportConfig) -> GgufFile:
    """The GGUF of a base with its adapter; nothing of a weight is read for it.

    Errors: `ModelError` for a family or a feature that llama.cpp has nothing for, `TokenizerError`,
    `ConfigError` where the package gguf is not installed.
    """
    config, kind = base.model.config, KINDS[dtype_of(base, options)]
    layout = Layout.of(config)
    rows = base.model.get_input_embeddings().weight.shape[0]
    said = metadata(config, rows)
    ends = end_ids(base.model, base.tokenizer)
    words = vocabulary(base.tokenizer, rows, ends, config.bos_token_id)
    tied = bool(config.tie_word_embeddings)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    weights = model_tensors(base, adapter, options.merged_into)
    tensors = [_tensor(layout, one, kind_of(one.shape, kind, one.name == head)) for one in weights]
    tensors += [FileTensor(n, t.shape, "F32", partial(_same, t)) for n, t in said.tensors.items()]
    name, is_hub_id = name_of(base, options)
    parameters = sum(one.shape.numel() for one in weights)
    return GgufFile(
        f"{STEM}-{options.quantize or kind}.gguf",
        layout.facts.architecture,
        [
            *general(name, is_hub_id, parameters, kind, words.strips),
            *said.fields,
            *words.metadata(),
            *chat_metadata(base.tokenizer),
        ],
        tensors,
        (*said.notes, *words.warnings(), *_said_of_kinds(tensors, kind, options.quantize)),
        said.context,
    )


def gguf_size(base: Base, options: ExportConfig) -> int:
    """Bytes of the export. Errors: as `gguf_file`."""
    return gguf_file(base, None, options).nbytes


def gguf_notes(base: Base, options: ExportConfig) -> Sequence[str]:
    """What a user of the file should know. Errors: as `gguf_file`."""
    return (*gguf_file(base, None, options).notes, *head_notes(base, options))


def write_gguf(base: Base, adapter: str | None, options: ExportConfig, directory: Path) -> None:
    """Write the file into a directory, one tensor in memory at a time, and Ollama's beside it.

    Errors: as `gguf_file`, `NumericError` for what a type cannot hold, and the system's.
    """
    made = gguf_file(base, adapter, options)
    write_gguf_file(directory / made.name, made.architecture, made.fields, made.tensors)
    ends, words = end_ids(base.model, base.tokenizer), base.tokenizer
    write_modelfile(directory, words, ends, made.context, model=made.name, chats=base.chats)


def _tensor(layout: Layout, one: ExportTensor, kind: str) -> FileTensor:
    """A tensor of the model by its name, in its row order and with its offset in the file."""
    module, _, leaf = one.name.rpartition(".")
    offset = layout.facts.norm_offset if module.endswith("norm") else 0.0

    def make() -> Tensor:
        tensor = one.make()
        if offset:
            tensor = tensor.to(torch.float32) + offset
        return layout.rows(module, tensor)

    return FileTensor(f"{layout.name(module)}.{leaf}", one.shape, kind, make)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _said_of_kinds(tensors: Sequence[FileTensor], asked: str, quantized: str | None) -> list[str]:
    """What differs from the type that was asked for, where one would not expect it.

    Of the types that llama.cpp quantizes to, only those of wide blocks fall back to others.
    """
    matrices = [one for one in tensors if len(one.shape) > 1]
    if quantized is not None:
        wide = "_K" in quantized or quantized == "IQ4_XS"
        uneven = sum(wide and one.shape[-1] % 256 > 0 for one in matrices)
        why = f"not {quantized}: their rows are no multiple of 256"
        smaller = f"{uneven} of {len(tensors)} tensors are in types of smaller blocks, {why}"
        return [smaller] if uneven else []
    others = [one for one in matrices if one.kind != asked]
    said = []
    for other in sorted({one.kind for one in others}):
        count = sum(one.kind == other for one in others)
        why = "their rows are no multiple of 32" if other == "F16" else "the head"
        said.append(f"{count} of {len(tensors)} tensors in {other}, not {asked}: {why}")
    return said
