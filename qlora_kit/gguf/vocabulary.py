"""A tokenizer as the keys of a GGUF: its tokens under `tokenizer.ggml`, and its chat templates.

What is written is the tokenizer as it is loaded here and was trained with, and not what its files
say: transformers builds some of them anew from their vocabulary. There are two kinds:

- `llama`, sentencepiece's BPE: spaces are `▁`, what is in no token becomes bytes `<0x0A>`, and a
  score says which neighbours are merged first; the scores are those of the merges
  (`sentencepiece.py`), so that no tokenizer.model is needed.
- `gpt2`, byte-level BPE: merges, and the name of a pre-tokenizer (`pre_tokenizer.py`).

llama.cpp takes as many tokens as the embedding has rows, each with a text of its own: rows beyond
the tokenizer get a name and are unused. Others (unigram, word pieces) are refused by name.

Sources: the specification of GGUF; llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_letters, digits
from typing import Any

from tokenizers import models

from qlora_kit.data.chat_template import templates_of
from qlora_kit.errors import TokenizerError
from qlora_kit.gguf.differences import CASES, Difference, inside_words, normal_form, spelled
from qlora_kit.gguf.ends import BY_NAME, end_keys
from qlora_kit.gguf.pre_tokenizer import KNOWN, find_names
from qlora_kit.gguf.sentencepiece import LOWEST, scores_of
from qlora_kit.gguf.spaces import SPACE, spaces_of, stripped, strips_as_phi3
from qlora_kit.gguf.token_list import BYTES, TokenType, is_byte_level, steps_of, token_list

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
TEMPLATES = "tokenizer.chat_templates"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
Value = str | bool | int | list[str] | list[int] | list[float]


@dataclass
class Vocabulary:
    """What a GGUF says of a tokenizer, and what it cannot say."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    strips: bool = False
    """whether spaces behind control tokens go away, which `general.name` has to say"""
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metadata(self) -> list[tuple[str, Value]]:
        """Keys and values: texts, truth values, unsigned numbers, and arrays of one kind."""
        found: list[tuple[str, Value]] = [
            ("model", self.model),
            ("pre", self.pre),
            ("tokens", self.tokens),
            ("token_type", [int(kind) for kind in self.types]),
        ]
        if self.scores is not None:
            found.append(("scores", self.scores))
        if self.merges is not None:
            found.append(("merges", self.merges))
        return [
            (PREFIX + name, value)
            for name, value in (*found, *self.ids.items(), *self.flags.items())
        ]

    def reads(self, text: str) -> bool:
        """Whether llama.cpp reads a text as the tokenizer does, as far as is known."""
        return not any(one.concerns(text) for one in self.differences)

    def warnings(self) -> list[str]:
        """A sentence for each thing that a user of the file should know."""
        return [f"llama.cpp reads otherwise: {one.said}" for one in self.differences] + self.notes


def vocabulary(
    tokenizer: Any, rows: int, ends: Collection[int], bos: int | None = None
) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for an embedding of `rows` rows.

    `ends` are the tokens at which answers stop, `bos` is the config's where the tokenizer has none.
    Errors: `TokenizerError` for a kind that llama.cpp does not read or would read otherwise.
    """
    if not tokenizer.is_fast:
        raise _refused(f"the tokenizer is a {type(tokenizer).__name__}, without a tokenizer.json")
    text = tokenizer.backend_tokenizer.to_str()
    read = _read(text, rows, bool(tokenizer.chat_template))
    found = replace(read, differences=[*read.differences], flags={**read.flags}, notes=[], ids={})
    _name_ids(found, tokenizer, ends, bos)
    return found


@functools.lru_cache(maxsize=1)
def _read(text: str, rows: int, chats: bool) -> Vocabulary:
    """What the text of a tokenizer.json says; an export asks for it several times."""
    backend = json.loads(text)
    model, added = backend["model"], backend["added_tokens"]
    if model["type"] != "BPE":
        raise _refused(f"the tokenizer is a {model['type']} model, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(f"the tokenizer has {name} {model[name]!r}")
    make = _byte_level if is_byte_level(backend["pre_tokenizer"]) else _sentencepiece
    found = make(backend, rows, chats)
    if len(set(found.tokens)) < len(found.tokens):
        twice = next(one for one in found.tokens if found.tokens.count(one) > 1)
        raise _refused(f"two tokens of the tokenizer are {twice!r}")
    found.strips = strips_as_phi3(added, found.tokens)
    if not found.strips:
        found.differences += stripped(added)
    found.differences += inside_words(added)
    return found


def _byte_level(backend: Mapping[str, Any], rows: int, chats: bool) -> Vocabulary:
    model = backend["model"]
    names = find_names(backend["pre_tokenizer"])
    pre = _by_ignoring(names, backend)
    merges = [" ".join(pair) for pair in _pairs(model)]
    if not merges:
        raise _refused("the tokenizer has no merges, and a GGUF no empty list")
    if any(merge.count(" ") != 1 for merge in merges):
        raise _refused("the tokenizer merges tokens with spaces in them")
    tokens, types = token_list(backend, rows)
    found = Vocabulary("gpt2", pre, tokens, types, merges=merges)
    found.differences += [normal_form(step) for step in steps_of(backend["normalizer"])]
    if KNOWN[pre].cases:
        found.differences.append(CASES)
    return found


def _by_ignoring(names: Sequence[str], backend: Mapping[str, Any]) -> str:
    """The name that leaves words whole as the tokenizer does, which matters for some tokens only.

    Errors: `TokenizerError` where there is none and it matters.
    """
    model = backend["model"]
    ignored = model.get("ignore_merges", False)
    for name in names:
        if KNOWN[name].ignore_merges == ignored:
            return name
    merging = models.BPE(model["vocab"], _pairs(model))
    words = model["vocab"].keys() - {one["content"] for one in backend["added_tokens"]}
    apart = min((one for one in words if len(merging.tokenize(one)) > 1), default=None)
    if apart is not None:
        raise _refused(
            f"the tokenizer has ignore_merges {ignored}, which llama.cpp's pre-tokenizer "
            f"{names[0]} has not, and no merges lead to {apart!r}"
        )
    return names[0]


def _sentencepiece(backend: Mapping[str, Any], rows: int, chats: bool) -> Vocabulary:
    model = backend["model"]
    if not model["byte_fallback"] or not model["vocab"].keys() >= BYTES:
        raise _refused("the tokenizer has neither a byte-level pre-tokenizer nor tokens of bytes")
    spaces = spaces_of(backend, chats)
    tokens, types = token_list(backend, rows)
    pairs = _pairs(model)
    added = {one["content"] for one in backend["added_tokens"]}
    plain = model["vocab"].keys() - BYTES - (added - {left + right for left, right in pairs})
    ranks = scores_of(plain, pairs)
    for one in backend["added_tokens"]:
        if types[one["id"]] is TokenType.USER_DEFINED and SPACE in one["content"]:
            if one["normalized"] and spaces.normalized:
                tokens[one["id"]] = one["content"].replace(SPACE, " ")
            elif one["content"] in ranks:
                # The merges give it: it is plain text, whose `▁` is a space in answers.
                types[one["id"]] = TokenType.NORMAL
    scored = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    scores = [
        ranks.get(token, LOWEST) if kind in scored else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    found = Vocabulary("llama", "default", tokens, types, scores)
    found.flags["add_space_prefix"] = spaces.before
    found.differences += spaces.differences
    return found


def _name_ids(found: Vocabulary, tokenizer: Any, ends: Collection[int], bos: int | None) -> None:
    """Fill in the special ids and whether BOS and EOS are put around a text."""
    named, notes = end_keys(tokenizer.eos_token_id, ends, found.tokens)
    found.notes += notes
    kinds = zip(found.tokens, found.types, strict=True)
    plain = [text for text, kind in kinds if kind is TokenType.NORMAL and text in BY_NAME]
    found.differences += spelled(plain)
    first = tokenizer.bos_token_id
    if first is None:
        # Without a key llama.cpp takes some token of its own for it.
        fits = bos is not None and 0 <= bos < len(found.tokens)
        first = bos if fits else named["eos_token_id"]
    found.ids["bos_token_id"] = first
    found.ids |= named
    for key, name in (("unknown_token_id", "unk"), ("padding_token_id", "pad")):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            found.ids[key] = token
    around = tokenizer("")["input_ids"]
    eos = tokenizer.eos_token_id
    choices = {(): (False, False), (first,): (True, False), (eos,): (False, True)}
    choices |= {(first, eos): (True, True)}
    if tuple(around) not in choices:
        texts = [found.tokens[one] for one in around]
        raise _refused(f"the tokenizer puts {texts} around a text, llama.cpp BOS and EOS alone")
    found.flags["add_bos_token"], found.flags["add_eos_token"] = choices[tuple(around)]


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"])
    return [(left, right) for left, right in split]


def _refused(problem: str) -> TokenizerError:
    return TokenizerError(
        f"{problem}: llama.cpp would read texts as other tokens", "export to --format hf"
    )


def chat_metadata(tokenizer: Any) -> list[tuple[str, str | list[str]]]:
    """Keys and values: the default template, each other one by its name, and their names.

    They are those of the tokenizer as it was trained with, a run's own included.
    """
    texts = {name: without_marks(text) for name, text in templates_of(tokenizer).items()}
    found: list[tuple[str, str | list[str]]] = []
    if "default" in texts:
        found.append((TEMPLATE, texts.pop("default")))
    named = {_plain(name): text for name, text in texts.items()}
    found += [(f"{TEMPLATE}.{name}", text) for name, text in sorted(named.items())]
    return [*found, (TEMPLATES, sorted(named))] if named else found


def without_marks(template: str) -> str:
    """A template without transformers' own `{% generation %}`, which marks what is trained on.

    A condition that always holds stands in its place: it takes the same blanks away around it.
    """
    return GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template
    )


def _plain(name: str) -> str:
    return "".join(one if one in ascii_letters + digits else "_" for one in name)
