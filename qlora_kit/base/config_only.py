"""A base from its config.json alone: what a memory plan needs of it, without weights.

The tensors' headers are the real ones where the weights are there, else those that the
architecture asks for, in the dtype that config.json names. A base that is quantized already is then
taken as if it came in that dtype and were quantized while it is loaded: it ends as the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.checks import BaseFiles, check_layers, find_config, read_config_file
from qlora_kit.base.contents import find
from qlora_kit.base.form import form_in_files, form_of_config, stated_form
from qlora_kit.base.meta_model import (
    build_on_meta,
    entries_of,
    expected_shapes,
    tied_names,
    with_rows,
)
from qlora_kit.base.narrow import narrow_matrices
from qlora_kit.base.safetensors_file import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    read_entries,
)
from qlora_kit.base.text_decoder import text_decoder
from qlora_kit.base.tokenizer import load_tokenizer, needed_rows
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.found import compute_dtype

DEFAULT_DTYPE = "bfloat16"


def open_shape(
    config: BaseConfig,
    device: torch.device,
    embedding_rows: int | None = None,
    files: BaseFiles | None = None,
) -> Base:
    """The base of a plan for `device`, on the meta device, without a tokenizer.

    `config.model` may also be a file like config.json. Nothing but that file is read, or fetched
    where it is a hub id; nothing at all of a base whose `files` are open. `embedding_rows` is what
    the embedding is resized to; with `--resize_embeddings` the tokenizer beside it says it.
    Errors: `ModelError`, `TokenizerError`, `UnsafeInputError`, `ConfigError`, `ResourceError`.
    """
    if files is None:
        source, path = find_config(config.model, config.revision)
        whole: Mapping[str, Any] = read_config_file(path)
        has_weights = any(find(path.parent, one) for one in (SINGLE_FILE, INDEX_FILE))
        there = read_entries(source.directory) if has_weights else None
        decoder = text_decoder(whole, there, path)
    else:
        source, path, decoder = files.source, files.config_path, files.decoder
    described, there = decoder.config, decoder.entries
    stated = stated_form(config, described, path)
    dtype = compute_dtype(config.dtype, device)
    if there is not None:
        check_layers(there, described, path)
    model = build_on_meta(described, dtype, path)
    entries: Mapping[str, TensorEntry]
    if there is not None:
        entries = entries_of(model, there)
        form = form_in_files(stated, entries, model, source.directory)
    if there is None or stated.is_stored:
        expected = _expected_entries(model, described, path)
        promised, entries = form_of_config(stated, expected, model)
        # What is quantized already ends as the same bytes, and the files say which linears are.
        if there is not None:
            promised = replace(promised, skipped=form.skipped, notes=form.notes)
        form = promised
    if embedding_rows is None and config.resize_embeddings:
        needed = needed_rows(load_tokenizer(source.directory))
        embedding_rows = needed if needed > model.get_input_embeddings().num_embeddings else None
    if embedding_rows is not None:
        model = build_on_meta(with_rows(described, embedding_rows), dtype, path)
    narrow = narrow_matrices(model, entries, dtype, device, stated.quantization, embedding_rows)
    return Base(
        model,
        None,
        source,
        files,
        entries,
        form,
        stated.quantization,
        torch.device("cpu"),
        dtype,
        embedding_rows,
        (*decoder.notes, *form.notes),
        decoder.wrapper,
        base_cache=config.base_cache and not stated.is_stored,
        narrow=narrow,
    )


def _expected_entries(
    model: PreTrainedModel, described: Mapping[str, Any], path: Path
) -> dict[str, TensorEntry]:
    """Headers as a checkpoint of this architecture would have them, one tensor after another."""
    said = described.get("dtype") or described.get("torch_dtype") or DEFAULT_DTYPE
    kinds = {name: (kind, size) for kind, (name, size) in DTYPES.items()}
    kind, size = kinds.get(str(said).removeprefix("torch."), kinds[DEFAULT_DTYPE])
    entries, start = {}, 0
    for name, shape in expected_shapes(model).items():
        if name not in tied_names(model):
            end = start + size * math.prod(shape)
            entries[name] = TensorEntry(name, kind, tuple(shape), path, start, end)
            start = end
    return entries
