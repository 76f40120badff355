"""Spaces before a text and beside control tokens, as sentencepiece's tokenizers treat them.

llama.cpp puts one before a text and behind each added token in it, or none at all
(`add_space_prefix`). Of the ways in which a tokenizer does it the normalizer `Prepend` is the same;
the pre-tokenizer `Metaspace` puts none before a space, and with the scheme `first` none behind an
added token.

Some tokenizers take the spaces beside control tokens away, and no key of a GGUF says it. llama.cpp
takes those behind control tokens away where the model's name has "phi-3" or "phi3" in it, as
Phi-3's tokenizer does, and nowhere else. So the name that a file gets is chosen for it: it has that
in it where the tokenizer is such a one, and not where it is not, for then llama.cpp would also look
for tokens that may not be there, and end.

Source: llama.cpp's src/llama-vocab.cpp, "set attributes by model/tokenizer/architecture name".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import TokenizerError
from qlora_kit.gguf.differences import Difference, normal_form
from qlora_kit.gguf.token_list import steps_of

SPACE = "▁"
LEFT = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens beside which llama.cpp leaves the spaces in a model of that name."""
NEEDED = (*LEFT, "</s>")
NAME = re.compile("phi-?3", re.IGNORECASE)
Added = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Spaces:
    """What a tokenizer does to spaces."""

    before: bool
    """whether llama.cpp is to put one before a text"""
    normalized: bool
    """whether they are `▁` already where added tokens are looked for"""
    differences: tuple[Difference, ...]


def spaces_of(backend: Mapping[str, Any], chats: bool) -> Spaces:
    """What a tokenizer.json does to spaces.

    Of a scheme `first` llama.cpp is to put none for a tokenizer that `chats`: every part of a chat
    stands behind an added token.
    Errors: `TokenizerError` for normalizers and pre-tokenizers that do something else.
    """
    added = [one["content"] for one in backend["added_tokens"]]
    prepends, replaces = False, False
    differences: list[Difference] = []
    for step in steps_of(backend["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            replaces = step["content"] == SPACE
        else:
            differences.append(normal_form(step))
    if prepends:
        differences += _behind_a_space(backend["added_tokens"])
    before, normalized = prepends, replaces
    for step in steps_of(backend["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
            scheme = step["prepend_scheme"]
            before = scheme == "always" or (scheme == "first" and not chats)
            replaces = True
            differences += _prefixed(scheme, before, added)
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or not replaces:
            described = {name: value for name, value in step.items() if name != "type"}
            raise _refused(f"has the pre-tokenizer {step['type']} {described}"[:200])
    if not replaces:
        raise _refused("leaves spaces as they are, where sentencepiece writes ▁")
    return Spaces(before, normalized, tuple(differences))


def _behind_a_space(added: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Added tokens that are normalized are so with the space before them, which they then need."""
    texts = [one["content"] for one in added if one["normalized"]]
    if texts:
        said = f"texts with {texts[0]!r}, which the tokenizer takes behind a space alone"
        spelled = [*texts, *(text.replace(SPACE, " ") for text in texts)]
        yield Difference(said, re.compile("|".join(map(re.escape, spelled))).search)


def _prefixed(scheme: str, before: bool, added: Sequence[str]) -> Iterator[Difference]:
    """What `Metaspace` does otherwise than llama.cpp, which puts a space or none `before`."""
    behind = "|".join(map(re.escape, added))
    if scheme == "never":
        return
    if not before:
        starts = (" ", SPACE, *added)
        yield Difference(
            "texts that begin without a control token, to which the tokenizer adds a space",
            lambda text: bool(text) and not text.startswith(starts),
        )
        return
    yield Difference(
        "texts and their parts that begin with a space, before which llama.cpp puts another",
        re.compile(rf"(?:^|{behind})[ ▁]" if added else "^[ ▁]").search,
    )
    if scheme == "first" and added:
        yield Difference(
            "what follows a control token, before which llama.cpp puts a space",
            re.compile(rf"(?:{behind})(?!{behind}|$)").search,
        )


def _refused(problem: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer {problem}: llama.cpp would read texts as other tokens",
        "export to --format hf",
    )


def strips_as_phi3(added: Added, tokens: Collection[str]) -> bool:
    """Whether the tokenizer takes spaces away as llama.cpp does for a model of that name."""
    stripping = {one["content"]: one["rstrip"] for one in added}
    return (
        any(stripping.values())
        and set(NEEDED) <= set(tokens)
        and not any(one["lstrip"] for one in added)
        and all(strips == (text not in LEFT) for text, strips in stripping.items())
    )


def general_name(name: str, strips: bool) -> str:
    """A model's name, for `general.name`, with which llama.cpp does what the tokenizer does."""
    if strips == (NAME.search(name) is not None):
        return name
    return f"{name} phi-3" if strips else NAME.sub("phi 3", name)


def stripped(added: Added) -> list[Difference]:
    """What a tokenizer that takes spaces away does otherwise than llama.cpp, which leaves them."""
    found = []
    for where, key in (("behind", "rstrip"), ("before", "lstrip")):
        texts = [one["content"] for one in added if one[key]]
        pattern = "|".join(map(re.escape, texts))
        concerned = rf"(?:{pattern})\s" if where == "behind" else rf"\s(?:{pattern})"
        if texts:
            said = f"spaces {where} tokens such as {texts[0]}, which the tokenizer drops"
            found.append(Difference(said, re.compile(concerned).search))
    return found
