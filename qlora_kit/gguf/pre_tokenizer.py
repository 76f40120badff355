r"""The name under which llama.cpp has a tokenizer's pre-tokenizer.

A byte-level BPE first splits a text into words. tokenizer.json holds the splits themselves; a GGUF
holds only a name (`tokenizer.ggml.pre`), for which llama.cpp has splits of its own. A name that
does not fit is not noticed: the file loads, and some texts become other tokens. So the splits are
brought into one form, a tuple of regular expressions applied one after another, and looked up
here; what is not in the table is refused. Each entry is proven by texts that both read alike
(`tests/gguf/test_three_readers.py`).

Where splits ask for capitals and small letters (\p{Lu}, \p{Ll}), llama.cpp knows those of ASCII
alone, and reads some texts otherwise (`differences.CASES`).

Sources: llama.cpp's src/llama-vocab.cpp; the pre-tokenizers of the library `tokenizers` 0.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import TokenizerError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The split that the pre-tokenizer `ByteLevel` has built in."""
DIGIT = r"\p{N}"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED = (rf"{BEFORE}{UPPER}*{LOWER}+", rf"{BEFORE}{UPPER}+{LOWER}*")
SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"


@dataclass(frozen=True)
class Known:
    """A pre-tokenizer of llama.cpp: its splits; whether a word that is a token is left whole."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    cases: bool = False
    """whether it takes other letters than the splits say for capitals and for small ones"""


KNOWN = {
    "gpt-2": Known((GPT2,)),
    "smollm": Known((DIGIT, GPT2)),
    "llama-bpe": Known((rf"{ENGLISH}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{REST}",), True),
    "dbrx": Known((rf"{ENGLISH}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{REST}",)),
    "qwen2": Known((rf"{ENGLISH}|{BEFORE}\p{{L}}+|\p{{N}}|{REST}",)),
    "qwen35": Known(
        (
            rf"{ENGLISH}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Known((rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHES}",), True, True),
    "gpt-4o": Known(
        (rf"{CASED[0]}{ENGLISH}?|{CASED[1]}{ENGLISH}?|\p{{N}}{{1,3}}|{SLASHES}",), False, True
    ),
    "deepseek-v3": Known(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            rf"{ASCII_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}
"""By llama.cpp's name. Of names for one split it is the one that leaves spaces in answers alone."""


def find_names(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """llama.cpp's names for these splits: they differ in `ignore_merges` alone.

    Errors: `TokenizerError`, naming what was found, where it has none.
    """
    splits = tuple(_splits(pre_tokenizer))
    names = [name for name, known in KNOWN.items() if known.splits == splits]
    if not names:
        raise _unknown(f"splits texts by {' then '.join(splits)[:200] or 'nothing'}")
    return names


def _splits(step: Mapping[str, Any] | None) -> list[str]:
    """A pre-tokenizer as regular expressions, each of which splits what the last one has left."""
    kind = None if step is None else step["type"]
    if step is None:
        return []
    if kind == "Sequence":
        return [split for part in step["pretokenizers"] for split in _splits(part)]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [DIGIT if step["individual_digits"] else rf"{DIGIT}+"]
    if kind == "Split":
        # Both keep a match whole and whole what is between two; the last where nothing is.
        isolated = step["behavior"] == "Isolated" and not step["invert"]
        matched = step["behavior"] == "Removed" and step["invert"]
        pattern = step["pattern"]
        if isolated or matched:
            regex = pattern.get("Regex", re.escape(pattern.get("String", "")))
            return [_canonical(regex)]
    described = {name: value for name, value in step.items() if name != "type"}
    raise _unknown(f"has the pre-tokenizer {kind} {described}"[:200])


def _canonical(regex: str) -> str:
    """One spelling of a regular expression."""
    for raw, escaped in (("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t")):
        regex = regex.replace(raw, escaped)
    return regex.replace("'(?i:[sdmt]|ll|ve|re)", ENGLISH).replace(r"\p{N}{1}|", r"\p{N}|")


def _unknown(problem: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer {problem}: no pre-tokenizer of llama.cpp is known to do the same",
        "export to --format hf; with a wrong name llama.cpp would read texts as other tokens",
    )
