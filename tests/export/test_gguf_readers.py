"""Laws of a GGUF read back: who reads it, what is said where nobody does, what is quantized."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from families import refused, token_ids
from gguf_models import save_model
from trained import trained_base

from qlora_kit.base.base import Base
from qlora_kit.commands.export import _show_read
from qlora_kit.commands.terminal import Terminal
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import with_room
from qlora_kit.errors import ConfigError, ExportError
from qlora_kit.export import gguf_readers, llamacpp
from qlora_kit.export.export import check_export, write_export
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.gguf_readers import spread
from qlora_kit.export.gguf_written import check_tensors
from qlora_kit.export.llamacpp import LIBRARIES, LlamaCpp, llama_library
from qlora_kit.generation.decode import generate_ids

ROWS = [Encoded(ids, ids) for n in (9, 30) for ids in token_ids(1, n, seed=n).tolist()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    save_model(directory, "llama2", hidden_size=256)
    return trained_base(directory, bits=4, dtype="fp32", device="cpu")


def options(**more: Any) -> ExportConfig:
    return ExportConfig(format="gguf", **more)


def written(base: Base, directory: Path, asked: ExportConfig) -> Path:
    FORMATS["gguf"].write(base, "default", asked, directory)
    (file,) = directory.glob("*.gguf")
    return file


def verified(base: Base, directory: Path, asked: ExportConfig) -> dict[str, Any]:
    return FORMATS["gguf"].verify(base, asked, directory, ROWS)


def test_greedy_text_is_that_of_generate(base: Base, tmp_path: Path) -> None:
    file = written(base, tmp_path, options())
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (3, 7, 12)]
    steps = generate_ids(base.model, prompts, max_new_tokens=12, eos_ids=(2,), pad_id=0)
    columns = zip(*steps, strict=True)
    expected = [[one for one in column if one is not None] for column in columns]
    with LlamaCpp(file) as llama:
        for ids, answer in zip(prompts, expected, strict=True):
            made: list[int] = []
            for _ in answer:
                (scores,) = llama.scores([*ids, *made], start=len(ids) + len(made) - 1)
                made.append(int(scores.argmax()))
            assert made == answer


def test_without_readers_it_is_said_that_tensors_are_what_was_written(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_readers, "llama_library", lambda adapter: None)
    monkeypatch.setattr(gguf_readers, "GGUF_SUPPORTED_ARCHITECTURES", [])
    file = written(base, tmp_path, options(export_dtype="q8_0"))
    report = verified(base, tmp_path, options(export_dtype="q8_0"))
    assert report["kl"] is None
    assert report["readers"] == {"gguf": {"tensors": 21, "read": "tensor by tensor"}}
    assert "pip install 'qlora-kit[llamacpp]'" in report["not_read_by"]["llama.cpp"]
    assert "no llama models" in report["not_read_by"]["transformers"]
    said = r"--max_kl 0\.1: nothing here reads the export \(llama.cpp: it is not .*; transformers: "
    with pytest.raises(ExportError, match=said):
        verified(base, tmp_path, options(export_dtype="q8_0", max_kl=0.1))
    with pytest.raises(ExportError, match=said):  # before a weight is read
        check_export(base, tmp_path, options(max_kl=0.1))
    check_export(base, tmp_path, options())
    content = bytearray(file.read_bytes())
    content[-9000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ExportError, match="is not what was written, and 0 others"):
        check_tensors(base, options(export_dtype="q8_0"), file)


def test_that_transformers_was_given_the_config_is_on_the_terminal(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_readers, "llama_library", lambda adapter: None)
    written(base, tmp_path, options())
    (read,) = verified(base, tmp_path, options())["readers"].values()
    _show_read(Terminal(), "transformers", read, "rows.jsonl")
    said = "verified   by transformers, with the settings of config.json, on 37 tokens of rows"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_a_reader_without_the_memory_is_not_asked(base: Base, tmp_path: Path, format: str) -> None:
    where = {"output_dir": str(tmp_path), "format": format}
    asked, limited = ExportConfig(**where), ExportConfig(**where, max_kl=0.1)
    FORMATS[format].write(base, "default", asked, tmp_path)
    with with_room(2**20):
        report = FORMATS[format].verify(base, asked, tmp_path, ROWS)
        with pytest.raises(ExportError, match=r"\(llama.cpp: it.* takes 0\.0 GiB of memory, and 0"):
            check_export(base, tmp_path, limited)
    assert report["kl"] is None
    assert re.search(r"it.* takes 0\.0 GiB of memory, and 0", report["not_read_by"]["llama.cpp"])
    check_export(base, tmp_path, limited)


@pytest.mark.skipif(not llama_library(adapter=True), reason="needs xllamacpp")
def test_a_reason_names_no_folder_of_this_machine(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(os.statvfs("/"))
    found[4] = 0  # blocks that are available
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result(found))
    monkeypatch.chdir(tmp_path)
    for asked in (str(tmp_path / "out"), "in"):
        options = ExportConfig(format="gguf-lora", output_dir=asked)
        (why,) = FORMATS["gguf-lora"].unread(base, options).values()
        assert re.fullmatch(r"the base in F32 needs \d+ bytes, and 0 are free", why)


@pytest.mark.parametrize(
    ("lengths", "scored", "computed", "expected"),
    [
        ([8, 29], 37, 37, [(0, 0, 8), (1, 0, 29)]),
        # A large vocabulary: the ends of as many rows as each have two positions in it.
        ([8, 29], 4, 99, [(0, 6, 8), (1, 27, 29)]),
        ([90] * 40, 16, 10**6, [(row, 88, 90) for row in range(8)]),
        ([1, 0, 90], 8, 99, [(0, 0, 1), (2, 83, 90)]),
        # A large model: what comes before is computed too, of four rows at least.
        ([90] * 40, 999, 200, [(row, 0, 50) for row in range(4)]),
        ([90], 4, 50, [(0, 46, 50)]),
        ([90, 90], 1, 1, [(1, 0, 1)]),
    ],
)
def test_the_ends_of_rows_are_asked_about(
    lengths: list[int], scored: int, computed: int, expected: list[tuple[int, int, int]]
) -> None:
    assert spread(lengths, scored, computed) == expected


@pytest.mark.parametrize("library", [n for n in LIBRARIES if importlib.util.find_spec(n)])
def test_of_a_large_vocabulary_few_tokens_are_compared_which_is_said(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    written(base, tmp_path, options())
    monkeypatch.setattr(gguf_readers, "GGUF_SUPPORTED_ARCHITECTURES", [])
    monkeypatch.setattr(llamacpp, "LIBRARIES", {library: (512, 264 * 6)})
    report = verified(base, tmp_path, options())
    assert report["tokens"] == 6
    assert report["kl"] < 1e-5  # of other positions it is another one
    note = report["readers"]["llama.cpp"]["note"]
    assert "asked about 6 tokens alone, of 37" in note


def test_quantizing_is_refused_before_weights_where_no_library_does_it(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cyllama" else known(name)
    )
    asked = options(output_dir=str(tmp_path / "out"), quantize="Q4_K_M")
    with refused(ConfigError, "--quantize Q4_K_M", "not installed", directory=tmp_path):
        check_export(base, tmp_path / "out", asked)
    with pytest.raises(ConfigError, match="quantize Q4_K_M goes with a dtype of 16 or 32 bits"):
        options(quantize="Q4_K_M", export_dtype="q8_0")


@pytest.mark.skipif(importlib.util.find_spec("cyllama") is None, reason="needs cyllama")
def test_llama_cpp_quantizes_and_the_result_is_verified(base: Base, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    asked = options(output_dir=str(tmp_path / "out"), quantize="Q6_K")

    def inspect(directory: Path) -> None:
        found.update(verified(base, directory, asked))

    out = write_export(base, asked, inspect)
    (file,) = out.glob("*.gguf")
    assert file.name == "model-Q6_K.gguf"
    assert "FROM ./model-Q6_K.gguf" in (out / "Modelfile").read_text()
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q6_K
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q6_K"
    assert found["readers"].keys() == {"llama.cpp", "transformers"}
    assert 1e-5 < found["kl"] < 0.2  # random weights, in some 6 bits
