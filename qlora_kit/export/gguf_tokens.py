"""Whether llama.cpp reads texts from a GGUF as the tokenizer does, and stops where answers end.

Some texts no GGUF makes it read so (`gguf/differences.py`), and a file names three ends: what is
known and was said when the file was written is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.llamacpp import LlamaCpp
from qlora_kit.export.token_check import check_ends, check_tokens, check_vocabulary, texts_of
from qlora_kit.generation.decode import end_ids
from qlora_kit.gguf.ends import BY_NAME
from qlora_kit.gguf.layout import import_gguf
from qlora_kit.gguf.vocabulary import PREFIX, vocabulary

LLAMA_CPP = "llama.cpp"
"""The reader's name."""


ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""The keys of a file that name ends of answers."""


class GgufTokens:
    """The tokens that a GGUF of a base should give."""

    def __init__(self, base: Base, rows: Sequence[Encoded]) -> None:
        model, self._tokenizer = base.model, base.tokenizer
        self._model = model
        count = model.get_input_embeddings().weight.shape[0]
        self._ends = end_ids(model, base.tokenizer)
        bos = getattr(model.config, "bos_token_id", None)
        self._vocabulary = vocabulary(base.tokenizer, count, self._ends, bos)
        self.texts = texts_of(rows, base.tokenizer)

    def check_llama(self, llama: LlamaCpp) -> int:
        """Compare llama.cpp's; the number of texts of equal tokens. Errors: `ExportError`."""
        names, ends = llama.names(), llama.ends
        if names is None or ends is None:
            self.check_file(llama.file)
        else:
            check_vocabulary(LLAMA_CPP, self._vocabulary.tokens, names)
            check_ends(LLAMA_CPP, self._model, self._tokenizer, ends | self._unnamed)
        texts = [text for text in self.texts if self._vocabulary.reads(text)]
        check_tokens(LLAMA_CPP, self._tokenizer, llama.tokenize, texts)
        return len(texts)

    def check_file(self, file: Path) -> None:
        """Compare what a file says itself of tokens and ends. Errors: `ExportError`."""
        fields = import_gguf().GGUFReader(file).fields
        said = {name: field.contents() for name, field in fields.items() if name.startswith(PREFIX)}
        check_vocabulary(file.name, self._vocabulary.tokens, said[f"{PREFIX}tokens"])
        ends = {said[PREFIX + name] for name in ENDS if PREFIX + name in said}
        by_name = {n for n, text in enumerate(said[f"{PREFIX}tokens"]) if text in BY_NAME}
        check_ends(file.name, self._model, self._tokenizer, ends | by_name | self._unnamed)

    def equal(self, theirs: Callable[[str], Any]) -> int:
        """The number of texts of which transformers' tokenizer of the file makes the same tokens.

        It is only counted: transformers (5.23) makes such a tokenizer up by the family, with that
        one's normalizer, and drops spaces.
        """
        ours = self._tokenizer
        return sum(list(theirs(t)["input_ids"]) == list(ours(t)["input_ids"]) for t in self.texts)

    @property
    def _unnamed(self) -> frozenset[int]:
        """The ends that a file has no room for."""
        found = self._vocabulary
        named = {found.ids.get(name) for name in ENDS}
        return frozenset(one for one in self._ends - named if found.tokens[one] not in BY_NAME)
