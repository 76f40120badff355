"""Texts that llama.cpp reads as other tokens than the tokenizer does, whatever a GGUF says.

It knows no normalizers and one rule for the space before a text. Where that matters it is said, and
`concerns` says of a text whether it is such a one; a tokenizer that differs on common texts is
refused instead.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_kit.errors import TokenizerError

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: dict[str, Form] = {"NFC": "NFC", "NFD": "NFD", "NFKC": "NFKC", "NFKD": "NFKD"}


@dataclass(frozen=True)
class Difference:
    """What is said of some texts, and which they are."""

    said: str
    concerns: Callable[[str], object]


def _has_marks_or_inner_capitals(text: str) -> bool:
    kinds = ["", *map(unicodedata.category, text), ""]
    return any(kind.startswith("M") for kind in kinds) or any(
        here in CAPITAL and one > "\x7f" and (before.startswith("L") or behind in CAPITAL)
        for one, before, here, behind in zip(text, kinds, kinds[1:], kinds[2:], strict=False)
    )


CAPITAL = ("Lu", "Lt")
CASES = Difference(
    "texts with combining marks, or with capitals beyond ASCII inside of words or before others, "
    "which llama.cpp splits at other places",
    _has_marks_or_inner_capitals,
)


def spelled(names: Sequence[str]) -> list[Difference]:
    """What llama.cpp takes for control tokens by their names, which are plain ones."""
    found = re.compile("|".join(map(re.escape, names)))
    return [Difference(f"texts with {names[0]!r}, a plain token", found.search)] if names else []


def normal_form(step: Mapping[str, Any]) -> Difference:
    """The difference that a normalizer makes, which llama.cpp does not have.

    Errors: `TokenizerError` where it changes more than how a character is written.
    """
    form = FORMS.get(step["type"])
    if form is None:
        described = {name: value for name, value in step.items() if name != "type"}
        raise TokenizerError(
            f"the tokenizer has the normalizer {step['type']} {described or ''}"[:200].rstrip()
            + ", which llama.cpp does not know",
            "export to --format hf",
        )
    return Difference(
        f"texts that are not in Unicode's form {form}, into which the tokenizer brings them",
        lambda text: not unicodedata.is_normalized(form, text),
    )


def inside_words(added: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """What llama.cpp takes for added tokens inside of words, where the tokenizer does not."""
    texts = [one["content"] for one in added if one["single_word"]]
    found = re.compile("|".join(rf"\w{text}|{text}\w" for text in map(re.escape, texts)))
    return [Difference(f"texts with {texts[0]!r} in a word", found.search)] if texts else []
