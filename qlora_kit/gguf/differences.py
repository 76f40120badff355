"""Texts that llama.cpp reads as other tokens than the tokenizer does, whatever a GGUF says.

It knows no normalizers and one rule for the space before a text. Where that matters it is said, and
`concerns` says of a text whether it is such a one; a tokenizer that differs on common texts is
refused instead.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_kit.errors import TokenizerError

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: dict[str, Form] = {"NFC": "NFC", "NFD": "NFD", "NFKC": "NFKC", "NFKD": "NFKD"}


@dataclass(frozen=True)
class Difference:
    """What is said of some texts, and which they are."""

    said: str
    concerns: Callable[[str], bool]


MARKS = Difference(
    "texts with combining marks, which llama.cpp splits at other places",
    lambda text: any(unicodedata.category(one).startswith("M") for one in text),
)


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


def prefixed(scheme: str, added: bool) -> list[Difference]:
    """What the pre-tokenizer `Metaspace` does otherwise than llama.cpp, which has `added` spaces.

    It puts no space before a space, nor (`first`) before what follows a control token.
    """
    if scheme == "never":
        return []
    if not added:
        return [
            Difference(
                "texts that begin without a control token, to which the tokenizer adds a space",
                lambda text: not text.startswith((" ", "▁")),
            )
        ]
    found = [
        Difference(
            "texts that begin with a space, before which llama.cpp puts another one",
            lambda text: text.startswith((" ", "▁")),
        )
    ]
    if scheme == "first":
        said = "what follows a control token, before which llama.cpp puts a space"
        found.append(Difference(said, lambda _: False))
    return found
