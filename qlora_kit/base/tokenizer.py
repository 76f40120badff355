"""A model directory's tokenizer, checked against the model's embedding."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base.contents import VOCABULARY_FILES, find, staged, tokenizer_files
from qlora_kit.base.hub import TEMPLATES
from qlora_kit.base.json_file import read_json
from qlora_kit.errors import ResourceError, TokenizerError

LARGEST_ID = 2**24
"""tokenizers 0.23 makes a list as long as the largest id where it writes a vocabulary."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, of which nothing is open. Errors: as `make_tokenizer`."""
    config = find(directory, "config.json")
    described = {} if config is None else read_json(config)
    return make_tokenizer(directory, tokenizer_files(directory), described)


def make_tokenizer(
    directory: Path,
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    embedding_rows: int | None = None,
) -> Any:
    """The transformers tokenizer of the checked `files` of a directory, whose config.json is given.

    Errors: `TokenizerError` where it is missing, broken, or has more tokens than `embedding_rows`.
    """
    present = [name for name in VOCABULARY_FILES if name in files]
    if not present:
        raise TokenizerError(
            f"{directory}: holds no tokenizer ({', '.join(VOCABULARY_FILES)})",
            "copy the tokenizer's files into the model directory",
        )
    from transformers import AutoTokenizer

    try:
        with staged(files) as place:
            _write_kind(config, place)
            tokenizer = AutoTokenizer.from_pretrained(
                str(place), trust_remote_code=False, local_files_only=True
            )
        tokenizer.name_or_path = str(directory)
        tokenizer.decode(tokenizer("a b")["input_ids"])
    except (KeyboardInterrupt, SystemExit, MemoryError, ResourceError):
        raise
    except BaseException as error:
        # A broken file gives bare exceptions of many kinds, some only in use, and a panic of the
        # Rust library is no Exception at all.
        alone = present == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None
        raise TokenizerError(
            f"{directory / present[0]}: cannot be read as a tokenizer: {error}",
            "install sentencepiece and protobuf, or put its tokenizer.json beside it"
            if alone
            else "fetch the tokenizer's files again",
        ) from error
    tokens = needed_rows(tokenizer)
    if tokens > LARGEST_ID + 1:
        raise TokenizerError(
            f"{directory / present[0]}: has a token with the id {tokens - 1}",
            "fetch the tokenizer's files again",
        )
    if embedding_rows is not None and tokens > embedding_rows:
        raise TokenizerError(
            f"{directory / present[0]}: {tokens} tokens, {embedding_rows} embedding rows",
            "use the tokenizer that belongs to this model, or add rows with --resize_embeddings",
        )
    return tokenizer


def _write_kind(config: Mapping[str, Any], place: Path) -> None:
    """Write a config.json of what transformers asks it for a tokenizer: which model's it is.

    The rest would be made into a model's config, in which a number may stand for a list as long.
    """
    names = ("model_type", "tokenizer_class")
    kept = {name: config[name] for name in names if isinstance(config.get(name), str)}
    if config:
        (place / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def needed_rows(tokenizer: Any) -> int:
    """Rows that an embedding must have for every token; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def copy_tokenizer(files: Mapping[str, Path], target: Path, templates: bool = True) -> None:
    """Copy a tokenizer's checked files, those of its chat templates included or not."""
    for name, path in files.items():
        if not templates and name.startswith(("chat_template.", TEMPLATES)):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
