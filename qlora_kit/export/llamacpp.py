"""llama.cpp, asked about a GGUF file: tokens, ends of answers, log-probabilities.

It runs in a process of its own (`llama_process.py`), which it may end: that is an error here. Of
the two libraries that hold it `cyllama` gives the logits of thousands of positions in a minute;
the server in `xllamacpp` one position at a time, as JSON (16 ms for 512 tokens, 0.6 s for 32,000),
and it alone applies an adapter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError, ExportError
from qlora_kit.gguf.extras import INSTALL_LLAMA_CPP
from qlora_kit.process.streams import plain
from qlora_kit.process.worker import PACKAGE, receive, send

LIBRARIES = {"cyllama": (4096, 2**27), "xllamacpp": (512, 2**21)}
"""The libraries, the better one first, and for each the most positions that it is asked about and
the most scores in all: what takes about a minute."""
WITH_ADAPTER = ("xllamacpp",)
AT_ONCE = 2**22
"""Scores that come over at once."""
REASON = re.compile(r"GGML_ASSERT|error loading|failed to|error:|invalid")
"""What a line of llama.cpp has that says why; the first one is nearest to the reason."""
LEVEL = re.compile(r"^[\d.]+ E +")

NOT_INSTALLED = f"it is not installed ({INSTALL_LLAMA_CPP})"

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
START += "from qlora_kit.export.llama_process import {call}"
SERVE = START.format(call="serve; serve()")
QUANTIZE = START.format(call="quantize; quantize(**json.loads(sys.argv[2]))")


def llama_library(*, adapter: bool = False) -> str | None:
    """The library that is installed and holds llama.cpp, or None."""
    for name in WITH_ADAPTER if adapter else LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            return name
    return None


class LlamaCpp:
    """A GGUF file in llama.cpp, with an adapter's GGUF on it where one is given.

    `context` is the longest row in tokens. Used as a context manager, which ends the process.
    Errors: `ConfigError` where no library is installed; here and in every question `ExportError`
    where llama.cpp refuses the file or ends.
    """

    def __init__(
        self,
        file: Path,
        *,
        lora: Path | None = None,
        context: int = 512,
        library: str | None = None,
    ) -> None:
        library = library or llama_library(adapter=lora is not None)
        if library is None:
            what = " or ".join(WITH_ADAPTER if lora is not None else LIBRARIES)
            raise ConfigError(f"llama.cpp is not installed ({what})", INSTALL_LLAMA_CPP)
        self.library = library
        self.gives_logits = library != "xllamacpp"
        """Whether `scores` are logits, or log-probabilities."""
        self.file = file
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._read = 0
        self._process = subprocess.Popen(
            _command(SERVE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # signals of the terminal are for the command
        )
        settings = {
            "library": library,
            "path": str(file),
            "lora": None if lora is None else str(lora),
            "context": context,
            "threads": torch.get_num_threads(),
        }
        try:
            facts, _ = self._ask(settings)
        except BaseException:
            self.end()
            raise
        self.vocabulary: int = facts["vocabulary"]
        """Tokens of the vocabulary."""
        self.ends: frozenset[int] | None = (
            None if facts["ends"] is None else frozenset(facts["ends"])
        )
        """The ids at which llama.cpp ends an answer; None where the library does not tell."""
        most, scores = LIBRARIES[library]
        self.positions = max(1, min(most, scores // self.vocabulary))
        """How many positions it should be asked about."""

    def names(self) -> list[str] | None:
        """The text of every token as the file has it; None where the library does not tell."""
        names: list[str] | None = self._ask(["names", []])[0]
        return names

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer puts before and after one."""
        ids: list[int] = self._ask(["tokenize", [text]])[0]
        return ids

    def scores(
        self, ids: Sequence[int], stop: int | None = None, *, start: int = 0
    ) -> Iterator[Tensor]:
        """Logits, each row up to a constant, of what follows each of `ids` from `start` to `stop`.

        In pieces (n, vocabulary), fp32, of consecutive positions.
        """
        stop = len(ids) if stop is None else stop
        step = max(1, AT_ONCE // self.vocabulary)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            _, numbers = self._ask(["scores", [list(ids), first, last]])
            yield torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(last - first, -1)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(OSError), self._process:
            self._process.wait()
        self._said.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _ask(self, question: Any) -> tuple[Any, bytes]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        reply = b""
        with contextlib.suppress(BrokenPipeError):
            send(self._process.stdin, json.dumps(question).encode())
            reply = receive(self._process.stdout)
        if not reply:
            raise self._error("it ended")
        found, wrong = json.loads(reply)
        numbers = receive(self._process.stdout)
        if wrong is not None:
            raise self._error(wrong)
        self._read = os.fstat(self._said.fileno()).st_size
        return found, numbers

    def _error(self, wrong: str) -> ExportError:
        """An error with the line of llama.cpp that says the reason, where one does."""
        self._said.seek(self._read)
        said = _reason(self._said.read(), wrong)
        return ExportError(
            f"llama.cpp ({self.library}) does not take {self.file.name}: {said}",
            "nothing was written; export another --format, or update the library that reads it",
        )


def quantize_gguf(source: Path, target: Path, kind: int) -> None:
    """Write a GGUF of plain numbers as llama.cpp's file type `kind`, in a process of its own.

    `check_extras` has found the library. Errors: `ExportError`.
    """
    settings = {"source": str(source), "target": str(target), "kind": kind}
    ended = subprocess.run(
        [*_command(QUANTIZE), json.dumps(settings | {"threads": torch.get_num_threads()})],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        check=False,
    )
    if ended.returncode:
        raise ExportError(
            f"llama.cpp does not quantize: {_reason(ended.stdout, 'it ended')}",
            "nothing was written; export without --quantize",
        )


def _command(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", "-c", code, json.dumps([PACKAGE, *sys.path])]


def _reason(printed: bytes, otherwise: str) -> str:
    """The line in what llama.cpp printed that says why."""
    lines = printed.decode(errors="replace").splitlines()
    reasons = [line for line in lines if REASON.search(line)]
    return LEVEL.sub("", plain(reasons[0].strip() if reasons else otherwise))[:200]
