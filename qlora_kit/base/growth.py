"""How much a tokenizer.json makes of a text: a bound on the longest token and on what is replaced.

A normalizer that puts ten letters for one, ten times in a row, makes 10^10 of each; the library
that runs it does not fail but takes the memory and aborts the process. So what the file's own
replacements can multiply a text by is computed from it before it is loaded. Unicode's forms, which
grow a text by their fixed tables, are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import TokenizerError

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
