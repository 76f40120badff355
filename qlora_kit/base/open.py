"""A base's files found and checked, before a byte of weights is read.

The architecture is built on the meta device and compared with the files' headers; `load.py` reads
what is described here.
"""

from __future__ import annotations

from qlora_kit.base.base import Base
from qlora_kit.base.checks import check_layers, read_config
from qlora_kit.base.contents import strays
from qlora_kit.base.form import form_in_files, stated_form
from qlora_kit.base.meta_model import build_on_meta, entries_of, take_generation_config, with_rows
from qlora_kit.base.safetensors_file import read_entries
from qlora_kit.base.source import resolve
from qlora_kit.base.text_decoder import text_decoder
from qlora_kit.base.tokenizer import load_tokenizer, needed_rows
from qlora_kit.base.towers import check_towers
from qlora_kit.config.base import BaseConfig
from qlora_kit.device import compute_dtype, find_device


def open_base(config: BaseConfig) -> Base:
    """Find a base and check its config, headers and tokenizer. Errors as `load_base`."""
    device = find_device(config.device)
    source = resolve(config.model, config.revision, check=read_config)
    dtype = compute_dtype(config.dtype, device)
    path = source.directory / "config.json"
    decoder = text_decoder(read_config(source.directory), read_entries(source.directory), path)
    described, entries = decoder.config, decoder.entries or {}
    stated = stated_form(config, described, path)
    check_layers(entries, described, path)
    model = build_on_meta(described, dtype, path)
    entries = entries_of(model, entries)
    form = form_in_files(stated, entries, model, source.directory)
    if decoder.wrapper is not None:
        check_towers(decoder.wrapper, path)
    rows, resized = model.get_input_embeddings().num_embeddings, None
    tokenizer = load_tokenizer(source.directory, None if config.resize_embeddings else rows)
    if needed_rows(tokenizer) > rows:
        resized = needed_rows(tokenizer)
        model = build_on_meta(with_rows(described, resized), dtype, path)
    take_generation_config(model, source.directory)
    return Base(
        model,
        tokenizer,
        source,
        entries,
        form,
        stated.quantization,
        device,
        dtype,
        resized,
        (*decoder.notes, *form.notes, *strays(source.directory)),
        decoder.wrapper,
    )
