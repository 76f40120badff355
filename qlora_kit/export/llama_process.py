"""What runs llama.cpp, in a process of its own; `llamacpp.py` asks.

llama.cpp ends its process on some files, so that it must not be ours. Two libraries hold it. With
`cyllama` a batch gives the logits of all its positions. `xllamacpp` has a server, whose completions
give the log-probabilities of one position at a time as JSON; it alone takes an adapter.

Nothing is approximated that need not be: the cache is fp32, and flash attention is off.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import urllib.error
import urllib.request
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import IO, Any

from qlora_kit.process.worker import receive, send

AT_ONCE = 2**23
"""Logits of one batch."""


class Cyllama:
    """A model in llama.cpp's own functions."""

    def __init__(self, path: str, lora: str | None, context: int, threads: int) -> None:
        from cyllama.llama import llama_cpp

        assert lora is None  # cyllama 0.2.18 loads an adapter, and has nothing to apply it
        self._llama = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.ggml_backend_load_all()

        class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
            # get_logits_ith of cyllama 0.2.18 asks the model for it, which has it no more.
            @property
            def n_vocab(self) -> int:
                return int(self.get_vocab().n_vocab)

        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self._model = Model(path_model=path, params=settings, verbose=False)
        settings = llama_cpp.LlamaContextParams()
        self._vocabulary = self._model.get_vocab()
        # The logits of one batch are in memory at once.
        self._step = max(32, min(context, AT_ONCE // self._vocabulary.n_vocab))
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, self._step, self._step
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.swa_full = True
        settings.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.LlamaContext(model=self._model, params=settings, verbose=False)
        self._cached: list[int] = []

    def facts(self) -> dict[str, Any]:
        """How many tokens the vocabulary has, and at which ids an answer ends (None: unknown)."""
        count = self._vocabulary.n_vocab
        ends = [one for one in range(count) if self._vocabulary.is_eog(one)]
        return {"vocabulary": count, "ends": ends}

    def names(self) -> list[str] | None:
        """The text of every token as the file has it; None: unknown."""
        return [self._vocabulary.get_text(one) for one in range(self._vocabulary.n_vocab)]

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, control strings in it read as the tokens that they name."""
        return list(self._vocabulary.tokenize(text, special, True))

    def scores(self, ids: Sequence[int], start: int, stop: int) -> Iterator[Sequence[float]]:
        """For the positions from `start` to `stop` a score of each token that may follow."""
        if self._cached != list(ids[:start]):
            self._context.kv_cache_clear()
            self._cached = []
        for first in range(len(self._cached), stop, self._step):
            last = min(first + self._step, stop)
            batch = self._llama.LlamaBatch(n_tokens=last - first, embd=0, n_seq_max=1)
            for place in range(first, last):
                batch.add(ids[place], place, [0], place >= start)
            self._context.decode(batch)
            self._cached = list(ids[:last])
            for place in range(max(first, start), last):
                yield self._context.get_logits_ith(place - first)


class Server:
    """The same in llama.cpp's server, on a port of this machine that it chooses."""

    def __init__(self, path: str, lora: str | None, context: int, threads: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = path
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.verbosity = 1  # errors
        settings.swa_full = True  # else what a window has left cannot be taken up again
        settings.warmup = settings.fit_params = False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_gpu_layers = 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
        self._server = xllamacpp.Server(settings)

    def facts(self) -> dict[str, Any]:  # noqa: D102
        return {"vocabulary": self._size, "ends": None}

    def names(self) -> list[str] | None:  # noqa: D102
        return None

    @cached_property
    def _size(self) -> int:
        return int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])

    @cached_property
    def _letter(self) -> int:
        return self.tokenize("a", False)[-1]

    def tokenize(self, text: str, special: bool = True) -> list[int]:  # noqa: D102
        asked = {"content": text, "add_special": special, "parse_special": True}
        return list(self._ask("/tokenize", asked)["tokens"])

    def scores(self, ids: Sequence[int], start: int, stop: int) -> Iterator[Sequence[float]]:  # noqa: D102
        for place in range(start, stop):
            row = [-math.inf] * self._size
            for token in self._next(ids[: place + 1]):
                row[token["id"]] = token["logprob"]
            yield row

    def _next(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The log-probability of every token that may follow `ids`."""
        asked: dict[str, Any] = {
            "prompt": list(ids),
            "n_predict": 1,
            "temperature": 0,
            "samplers": ["temperature"],
            "n_probs": self._size,
            "post_sampling_probs": False,
            "cache_prompt": True,  # of one more token only that one is computed
            # The server keeps back what ends an answer or is half a character, and what it knows
            # of it. So the token is a letter; the probabilities are those from before the choice.
            "logit_bias": [[self._letter, 1e9]],
        }
        found = self._ask("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        return list(found)

    def _ask(self, path: str, question: Any = None) -> Any:
        content = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, content, {"Content-Type": "application/json"}
        )
        # Not through a proxy: the server is in this process.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from error


BACKENDS: dict[str, type[Cyllama] | type[Server]] = {"cyllama": Cyllama, "xllamacpp": Server}


def serve() -> None:
    """Load the model that the first message names, and answer until the other process goes.

    An answer is a message of JSON, [what was asked for, what went wrong], and one of fp32 numbers.
    """
    source = sys.stdin.buffer
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as sink:
        os.dup2(2, 1)
        asked = json.loads(receive(source))
        try:
            backend = BACKENDS[asked.pop("library")](**asked)
            _answer(sink, backend.facts())
        except Exception as error:
            _answer(sink, None, str(error) or type(error).__name__)
            return
        while content := receive(source):
            name, arguments = json.loads(content)
            try:
                found = getattr(backend, name)(*arguments)
                numbers = array("f")
                if name == "scores":
                    for row in found:
                        numbers.extend(row)
                    found = None
                _answer(sink, found, numbers=numbers.tobytes())
            except Exception as error:
                _answer(sink, None, str(error) or type(error).__name__)


def quantize(source: str, target: str, kind: int, threads: int) -> None:
    """Write the GGUF `source` as llama.cpp's file type `kind`. Only cyllama has this."""
    from cyllama.llama import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.ggml_backend_load_all()
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = kind, threads
    llama_cpp.model_quantize(source, target, settings)


def _answer(sink: IO[bytes], found: Any, wrong: str | None = None, numbers: bytes = b"") -> None:
    with contextlib.suppress(BrokenPipeError):
        send(sink, json.dumps([found, wrong]).encode())
        send(sink, numbers)
