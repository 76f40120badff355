"""Whether llama.cpp reads texts from a GGUF as the tokenizer does, and stops where answers end.

Some texts no GGUF makes it read so (`gguf/differences.py`), and a file names three ends: what is
known and was said when the file was written is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.llamacpp import LlamaCpp
from qlora_kit.export.token_check import check_ends, check_tokens, check_vocabulary, texts_of
from qlora_kit.generation.decode import end_ids
from qlora_kit.gguf.ends import BY_NAME
from qlora_kit.gguf.vocabulary import vocabulary

LLAMA_CPP = "llama.cpp"
"""The reader's name."""


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
        if (names := llama.names()) is not None:
            check_vocabulary(LLAMA_CPP, self._vocabulary.tokens, names)
        if llama.ends is not None:
            check_ends(LLAMA_CPP, self._model, self._tokenizer, llama.ends | self._unnamed)
        texts = [text for text in self.texts if self._vocabulary.reads(text)]
        check_tokens(LLAMA_CPP, self._tokenizer, llama.tokenize, texts)
        return len(texts)

    def check(self, reader: str, theirs: Callable[[str], Any]) -> int:
        """Compare transformers' tokenizer of the file; the number of texts of equal tokens.

        Those with scores drop spaces (transformers 5.23), which is not the file's doing: of these
        it is only counted. Errors: `ExportError`.
        """
        ours = self._tokenizer

        def ids(text: str) -> list[int]:
            return list(theirs(text)["input_ids"])

        if self._vocabulary.model == "gpt2":
            check_tokens(reader, ours, ids, self.texts)
        return sum(ids(text) == list(ours(text)["input_ids"]) for text in self.texts)

    @property
    def _unnamed(self) -> frozenset[int]:
        """The ends that a file has no room for."""
        found = self._vocabulary
        named = {found.ids.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
        return frozenset(one for one in self._ends - named if found.tokens[one] not in BY_NAME)
