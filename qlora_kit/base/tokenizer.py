"""A model directory's tokenizer, checked against the model's embedding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qlora_kit.base.source import contained
from qlora_kit.base.validate import read_json
from qlora_kit.errors import TokenizerError, UnsafeInputError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(directory: Path, embedding_rows: int | None = None) -> Any:
    """The directory's tokenizer (a transformers tokenizer), from local files alone.

    Errors: `TokenizerError` where it is missing, broken, or has more tokens than `embedding_rows`.
    """
    present = [name for name in VOCABULARY_FILES if (directory / name).exists()]
    if not present:
        raise TokenizerError(
            f"{directory}: holds no tokenizer ({', '.join(VOCABULARY_FILES)})",
            "copy the tokenizer's files into the model directory",
        )
    for name in present:
        contained(directory, name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).exists():
            content = read_json(contained(directory, name), TokenizerError)
            if "auto_map" in content:
                raise UnsafeInputError(
                    f"{directory / name}: auto_map asks to run Python files of the model",
                    "use a tokenizer that transformers supports by itself",
                )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        # The libraries below raise bare exceptions of many kinds for a broken file.
        raise TokenizerError(
            f"{directory / present[0]}: cannot be read as a tokenizer: {error}",
            "fetch the tokenizer's files again",
        ) from error
    if embedding_rows is not None and len(tokenizer) > embedding_rows:
        raise TokenizerError(
            f"{directory / present[0]}: {len(tokenizer)} tokens, {embedding_rows} embedding rows",
            "use the tokenizer that belongs to this model",
        )
    return tokenizer


def copy_tokenizer(directory: Path, target: Path) -> None:
    """Copy the tokenizer's files, chat template included, byte by byte."""
    for name in TOKENIZER_FILES:
        if (directory / name).exists():
            shutil.copyfile(contained(directory, name), target / name)
