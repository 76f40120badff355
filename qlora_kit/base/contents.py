"""Every file of a model's or an adapter's directory that may be opened, checked before it is.

This is the one list. A file on it lies in the directory, is a regular file, is not larger than a
file of its name can be, and is not something else under that name; a link to nothing is a broken
directory and not an absent file. What is not on it is not opened: transformers, which looks for
many more names and follows those that it finds inside its files, reads a tokenizer from a private
directory of links to the checked files (`staged`) and never from the one that was handed in.

A normalizer that puts ten letters for one, ten times in a row, makes 10^10 of each, and the library
that runs it takes the memory and aborts the process. So what the replacements of a tokenizer.json
can multiply a text by is bounded before it is loaded. Unicode's forms are not counted.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.base.hub import TEMPLATES
from qlora_kit.base.json_file import SETTINGS_LIMIT, read_json
from qlora_kit.base.source import broken_link, contained
from qlora_kit.errors import (
    InputError,
    ModelError,
    ResourceError,
    TokenizerError,
    UnsafeInputError,
)
from qlora_kit.files.kind import refuse_kind

MIB = 1024**2
VOCABULARY_LIMIT = 64 * MIB  # twice the largest, of 260,000 tokens, each on a line of its own
TEMPLATE_LIMIT = MIB
VOCABULARY_FILES = {
    "tokenizer.json": VOCABULARY_LIMIT,
    "tokenizer.model": VOCABULARY_LIMIT,
    "vocab.json": VOCABULARY_LIMIT,
}
TOKENIZER_FILES = {
    **VOCABULARY_FILES,
    "merges.txt": VOCABULARY_LIMIT,
    "tokenizer_config.json": SETTINGS_LIMIT,
    "special_tokens_map.json": SETTINGS_LIMIT,
    "added_tokens.json": SETTINGS_LIMIT,
    "chat_template.jinja": TEMPLATE_LIMIT,
    "chat_template.json": TEMPLATE_LIMIT,
}
"""Name to the most bytes it may have."""
BESIDE_AN_ADAPTER = ("config.yaml", "chat_template.jinja")
"""What our runs leave in an adapter's directory beside PEFT's files, and read there again."""
PROCESSOR_FILES = {
    "preprocessor_config.json": SETTINGS_LIMIT,
    "processor_config.json": SETTINGS_LIMIT,
    "video_preprocessor_config.json": SETTINGS_LIMIT,
}
"""How other input than text becomes tokens: copied beside a whole multimodal export, not read."""
LIMITS = {
    **TOKENIZER_FILES,
    **PROCESSOR_FILES,
    "config.json": SETTINGS_LIMIT,
    "generation_config.json": SETTINGS_LIMIT,
    "adapter_config.json": SETTINGS_LIMIT,
    "config.yaml": SETTINGS_LIMIT,
    "model.safetensors.index.json": SETTINGS_LIMIT,
}
TEMPLATES_LIMIT = 100
"""Named templates of one tokenizer."""
OTHER_FORMS = {
    "consolidated*.safetensors": "Mistral's own form",
    "*.gguf": "llama.cpp's form",
}
"""Weights that are not read, wherever they lie beside those that are."""


def find(directory: Path, name: str, error: type[InputError] = ModelError) -> Path | None:
    """The file `name` of a directory; None where there is no entry of that name.

    It is not opened: whoever reads it looks at what it is (`refuse_kind`). Weights (names that are
    not in the list) may have any size. Errors: `UnsafeInputError` as `contained`; `error` for a
    link to nothing, or a file that is too large.
    """
    if not os.path.lexists(directory / name) and broken_link(directory / name) is None:
        return None
    path = contained(directory, name, error)
    check_size(
        path, LIMITS.get(name, TEMPLATE_LIMIT if name.startswith(TEMPLATES) else None), error
    )
    return path


def check_size(path: Path, limit: int | None, error: type[InputError]) -> None:
    """Refuse a file of more bytes than one of its name can have. Errors: `error`."""
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise error(f"{path}: has {size} bytes", f"a file like this has at most {limit}")


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """The files of a directory's tokenizer by their names in it, each opened once and checked.

    Beside the known names these are `additional_chat_templates/*.jinja` and the versions of
    tokenizer.json that `fast_tokenizer_files` of tokenizer_config.json names.
    Errors: `TokenizerError`, `UnsafeInputError`.
    """
    names = [*TOKENIZER_FILES, *_named_templates(directory)]
    found = {name: path for name in names if (path := find(directory, name, TokenizerError))}
    versions: list[str] = []
    for name, path in found.items():
        described = _checked(path, directory)
        if name == "tokenizer_config.json":
            versions = _versions(described, path)
            _check_templates(described.get("chat_template"), path)
    for name in versions:
        path = contained(directory, name, TokenizerError)
        check_size(path, VOCABULARY_LIMIT, TokenizerError)
        _checked(path, directory)
        found[name] = path
    return found


def _checked(path: Path, directory: Path) -> Mapping[str, object]:
    """What a JSON file of a tokenizer holds, nothing for another one; refused for what it is."""
    if path.suffix != ".json":
        refuse_kind(path, TokenizerError)
        return {}
    described = read_json(path, TokenizerError, VOCABULARY_LIMIT)
    check_growth(described, path)
    if "auto_map" in described and names_code(described["auto_map"], directory):
        raise UnsafeInputError(
            f"{path}: auto_map asks to run Python files of the model",
            "remote code is never run: use a tokenizer that transformers supports by itself, "
            "without Python files in its directory",
        )
    return described


def _check_templates(found: object, path: Path) -> None:
    """Refuse a `chat_template` that is neither a text nor texts by name."""
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        texts = [text for one in found for text in (one.get("name"), one.get("template"))]
    else:
        texts = list(found.values()) if isinstance(found, dict) else [found or ""]
    if not all(isinstance(text, str) for text in texts):
        raise TokenizerError(
            f"{path}: chat_template is {repr(found)[:60]}, not a text or a list of named ones",
            "correct or remove it",
        )


def names_code(auto_map: object, directory: Path) -> bool:
    """Whether an `auto_map` names code that is there: Python files beside it, or a hub's."""
    return "--" in str(auto_map) or any(directory.glob("*.py"))


def _named_templates(directory: Path) -> list[str]:
    folder = directory / TEMPLATES
    if not folder.is_dir():
        if broken_link(folder) or folder.exists():
            raise TokenizerError(
                f"{folder}: is no folder of chat templates", "remove it, or fetch it again"
            )
        return []
    names = sorted(path.name for path in folder.glob("*.jinja"))
    if len(names) > TEMPLATES_LIMIT:
        raise TokenizerError(
            f"{folder}: holds {len(names)} templates", f"leave at most {TEMPLATES_LIMIT}"
        )
    return [f"{TEMPLATES}/{name}" for name in names]


def _versions(settings: Mapping[str, object], path: Path) -> list[str]:
    """The files that `fast_tokenizer_files` names."""
    named = settings.get("fast_tokenizer_files", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise TokenizerError(
            f"{path}: fast_tokenizer_files is {repr(named)[:60]}, not a list of names",
            "correct or remove it",
        )
    if len(named) > TEMPLATES_LIMIT:
        raise TokenizerError(
            f"{path}: fast_tokenizer_files names {len(named)} files", "correct or remove it"
        )
    return [name for name in named if name not in TOKENIZER_FILES]


def strays(directory: Path) -> tuple[str, ...]:
    """What is to be said of weights in another form that lie beside those that are read."""
    return tuple(
        f"{found[0]} is {form} of the weights: it is left alone"
        for pattern, form in OTHER_FORMS.items()
        if (found := sorted(path.name for path in directory.glob(pattern)))
    )


def refuse_strays(directory: Path) -> None:
    """Refuse a directory that holds weights in another form alone. Errors: `ModelError`."""
    for pattern, form in OTHER_FORMS.items():
        for path in sorted(directory.glob(pattern))[:1]:
            raise ModelError(
                f"{path}: is {form} of the weights, which is not read",
                "fetch config.json and model*.safetensors of the same model (transformers' form)",
            )


@contextlib.contextmanager
def staged(files: Mapping[str, Path]) -> Iterator[Path]:
    """A private directory that holds these files, as links, under these names and nothing else.

    Errors: `ResourceError` where there is no place for temporary files.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="qlora-kit-"))
            for name, path in files.items():
                link = Path(made) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        except OSError as error:
            raise ResourceError(
                f"{tempfile.gettempdir()}: no room for links to {len(files)} files: "
                f"{error.strerror}",
                "set TMPDIR to a place that can be written to",
            ) from error
        yield Path(made)


GROWTH_LIMIT = 32.0
"""Times as many bytes; a space becomes three in the tokenizers that come from SentencePiece."""
PUT = ("content", "prepend", "replacement", "prefix", "suffix")
"""Fields of a step whose text is put into what it is given."""
REGEX_LIMIT = 10_000
TOKEN_LIMIT = 2**14
"""Bytes of a token's text; the longest of known vocabularies have some hundred."""


def check_growth(described: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer.json that could make too much of a text. Errors: `TokenizerError`."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _growth(described.get(part))
        if growth > GROWTH_LIMIT:
            raise TokenizerError(
                f"{path}: its {part} can make a text {growth:.0f} times as long, above "
                f"{GROWTH_LIMIT:.0f}",
                "fetch the tokenizer's files again, or correct it",
            )
    model, added = described.get("model"), described.get("added_tokens")
    listed = added if isinstance(added, list) else []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = list(vocabulary) if isinstance(vocabulary, (dict, list)) else []
    tokens += [one.get("content") for one in listed if isinstance(one, dict)]
    texts = (one[0] if isinstance(one, list) and one else one for one in tokens)
    longest = max((len(one) for one in texts if isinstance(one, str)), default=0)
    if longest > TOKEN_LIMIT:
        raise TokenizerError(
            f"{path}: has a token of {longest} characters", "fetch the tokenizer's files again"
        )


def _growth(step: Any) -> float:
    """What a step, or the steps of a sequence one after another, can multiply a text by."""
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Sequence":
        product = 1.0
        for steps in step.values():
            for one in steps if isinstance(steps, list) else ():
                product = min(product * _growth(one), 1e300)
        return product
    texts = {
        key: value.encode(errors="replace")
        for key, value in step.items()
        if isinstance(value, str) and key in PUT
    }
    if step.get("type") == "Replace":
        made, pattern = len(texts.get("content", b"")), step.get("pattern")
        found = pattern if isinstance(pattern, dict) else {}
        if isinstance(found.get("String"), str):
            replaced = len(found["String"].encode(errors="replace"))
            return max(1.0, made / max(1, replaced)) if replaced else 1.0 + made
        return 1.0 + made if _matches_nothing(found.get("Regex")) else max(1.0, float(made))
    # A text that is put before each part; parts of less than a word are rare.
    return 1.0 + max(map(len, texts.values()), default=0) / 64


def _matches_nothing(regex: Any) -> bool:
    """Whether a regex matches between any two characters, where that can be told."""
    if not isinstance(regex, str) or len(regex) > REGEX_LIMIT:
        return True
    try:
        return re.compile(regex).match("") is not None
    except (re.error, OverflowError, RecursionError):
        return True  # the library has a syntax of its own
