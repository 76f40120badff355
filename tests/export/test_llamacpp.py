"""Laws of llama.cpp in a process of its own: what it refuses, or dies of, is an error here."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.errors import ConfigError, ExportError
from qlora_kit.export import llamacpp
from qlora_kit.export.llamacpp import LIBRARIES, LlamaCpp, llama_library

INSTALLED = [name for name in LIBRARIES if llamacpp.importlib.util.find_spec(name)]


@pytest.mark.parametrize("library", INSTALLED)
def test_a_file_that_is_none_is_refused_with_what_llama_cpp_says(
    tmp_path: Path, library: str
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"hello, this is no model")
    with pytest.raises(ExportError, match=rf"llama.cpp \({library}\) .* model.gguf: .*hell"):
        LlamaCpp(file, library=library)


def test_a_process_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As llama.cpp ends its own where an assertion fails; the last words are in the error."""
    dies = "import sys, os; sys.stdin.buffer.read(8)\n"
    dies += "print('ggml.c:1: GGML_ASSERT(rows > 0) failed', file=sys.stderr); os.abort()"
    monkeypatch.setattr(llamacpp, "SERVE", dies)
    with pytest.raises(ExportError, match=r"GGML_ASSERT\(rows > 0\) failed"):
        LlamaCpp(tmp_path / "model.gguf", library="cyllama")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    assert llama_library() is None
    with pytest.raises(ConfigError, match="not installed") as caught:
        LlamaCpp(tmp_path / "model.gguf")
    assert "qlora-kit[llamacpp]" in caught.value.remedy
