"""A base's files found and checked, before a byte of weights is read.

The architecture is built on the meta device and compared with the files' headers; `load.py` reads
what is described here.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.base.base import Base
from qlora_kit.base.cache import kept_note
from qlora_kit.base.checks import BaseFiles, check_layers, find_base
from qlora_kit.base.form import form_in_files, stated_form
from qlora_kit.base.meta_model import build_on_meta, entries_of, generation_config_of, with_rows
from qlora_kit.base.narrow import narrow_matrices
from qlora_kit.base.quantize import check_library
from qlora_kit.base.tokenizer import make_tokenizer, needed_rows
from qlora_kit.base.towers import check_wrapper
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.found import compute_dtype, device_notes, dtype_notes, find_device


def open_base(config: BaseConfig, files: BaseFiles | None = None) -> Base:
    """Check a base's config, headers and tokenizer against each other; no weight is read.

    Its `files` are found and opened unless they were already. Errors as `load_base`.
    """
    device = find_device(config.device)
    files = files or find_base(config.model, config.revision)
    source, path = files.source, files.config_path
    dtype = compute_dtype(config.dtype, device)
    decoder = files.decoder
    described, entries = decoder.config, decoder.entries or {}
    stated = stated_form(config, described, path)
    if stated.quantization.bits < 16:
        check_library(device)
    check_layers(entries, described, path)
    model = build_on_meta(described, dtype, path)
    entries = entries_of(model, entries)
    form = form_in_files(stated, entries, model, source.directory)
    if decoder.wrapper is not None:
        check_wrapper(decoder.wrapper, model, path)
    rows, resized = model.get_input_embeddings().num_embeddings, None
    tokenizer = make_tokenizer(
        source.directory, files.tokenizer, files.config, None if config.resize_embeddings else rows
    )
    if needed_rows(tokenizer) > rows:
        resized = needed_rows(tokenizer)
        model = build_on_meta(with_rows(described, resized), dtype, path)
    model.generation_config = generation_config_of(
        model.generation_config, files.generation, source.directory
    )
    base = Base(
        model,
        tokenizer,
        source,
        files,
        entries,
        form,
        stated.quantization,
        device,
        dtype,
        resized,
        (
            *(*decoder.notes, *form.notes, *files.strays),
            *device_notes(device),
        ),
        decoder.wrapper,
        base_cache=config.base_cache,
        narrow=narrow_matrices(model, entries, dtype, device, stated.quantization, resized),
    )
    narrow = {base.entries[name].torch_dtype for name in base.narrow}
    kept = kept_note(base)
    said = (*dtype_notes(dtype, device, narrow), *(() if kept is None else (kept,)))
    return replace(base, notes=(*base.notes, *said)) if said else base
