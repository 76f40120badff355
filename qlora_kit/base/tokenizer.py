"""A model directory's tokenizer, checked against the model's embedding."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from qlora_kit.base.contents import (
    VOCABULARY_FILES,
    VOCABULARY_LIMIT,
    find,
    names_code,
    staged,
    tokenizer_files,
)
from qlora_kit.base.growth import check_growth
from qlora_kit.base.hub import TEMPLATES
from qlora_kit.base.json_file import read_json
from qlora_kit.errors import ResourceError, TokenizerError, UnsafeInputError

LARGEST_ID = 2**24
"""tokenizers 0.23 makes a list as long as the largest id where it writes a vocabulary."""


def load_tokenizer(directory: Path, embedding_rows: int | None = None) -> Any:
    """The directory's tokenizer (a transformers tokenizer), from local files alone.

    Errors: `TokenizerError` where it is missing, broken, or has more tokens than `embedding_rows`.
    """
    files = tokenizer_files(directory)
    present = [name for name in VOCABULARY_FILES if name in files]
    if not present:
        raise TokenizerError(
            f"{directory}: holds no tokenizer ({', '.join(VOCABULARY_FILES)})",
            "copy the tokenizer's files into the model directory",
        )
    for path in files.values():
        if path.suffix != ".json":
            continue
        described = read_json(path, TokenizerError, VOCABULARY_LIMIT)
        check_growth(described, path)
        if "auto_map" in described and names_code(described["auto_map"], directory):
            raise UnsafeInputError(
                f"{path}: auto_map asks to run Python files of the model",
                "remote code is never run: use a tokenizer that transformers supports by itself, "
                "without Python files in its directory",
            )
    config = find(directory, "config.json")
    from transformers import AutoTokenizer

    try:
        with staged(files) as place:
            if config is not None:
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


def _write_kind(config: Path, place: Path) -> None:
    """Write a config.json of what transformers asks it for a tokenizer: which model's it is.

    The rest would be made into a model's config, in which a number may stand for a list as long.
    """
    said = read_json(config)
    names = ("model_type", "tokenizer_class")
    kept = {name: said[name] for name in names if isinstance(said.get(name), str)}
    (place / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def needed_rows(tokenizer: Any) -> int:
    """Rows that an embedding must have for every token; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def copy_tokenizer(directory: Path, target: Path, templates: bool = True) -> None:
    """Copy the tokenizer's files, those of its chat templates included or not, byte by byte."""
    for name, path in tokenizer_files(directory).items():
        if not templates and name.startswith(("chat_template.", TEMPLATES)):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
