"""`export --format gguf-lora`: the adapter alone, verified, or refused early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import save_model
from trained import save_peft, save_trained, write_rows

from qlora_kit.base.load import load_base
from qlora_kit.export.export import export_model
from qlora_kit.export.llamacpp import llama_library

Run = Callable[..., Any]
COMMAND = ("export", "--format", "gguf-lora", "--output_dir", "out")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_adapter_is_written_and_its_updates_are_read_back(run: Run, workshop: Any) -> None:
    answer = run(*COMMAND, "--adapter", workshop.adapter, "--base_name", "owner/name")
    assert (answer.code, answer.err) == (0, "")
    report = json.loads(Path("out/export.json").read_text())
    assert f"verified   {report['updates']} updates, read back, are equal to the " in answer.out
    assert report["update_error"] < 1e-6
    assert (report["format"], report["merge_base"], report["dtype"]) == (
        "gguf-lora",
        "none",
        "fp32",
    )
    reader = gguf.GGUFReader("out/adapter.gguf")
    assert len(reader.tensors) == 2 * report["updates"] == 2 * 14
    said = reader.get_field("general.base_model.0.repo_url").contents()
    assert said == "https://huggingface.co/owner/name"
    # The export that is there already stays, whatever comes.
    before = Path("out/adapter.gguf").read_bytes()
    assert run(*COMMAND, "--adapter", workshop.adapter).code != 0
    assert Path("out/adapter.gguf").read_bytes() == before
    assert run(*COMMAND, "--adapter", workshop.adapter, "--overwrite").code == 0
    ollama = Path("out/Modelfile").read_text()
    assert "FROM ./base.gguf\nADAPTER ./adapter.gguf\nPARAMETER stop" in ollama


def test_llama_cpp_runs_it_on_its_base(run: Run, tmp_path: Path) -> None:
    if llama_library(adapter=True) is None:
        pytest.skip("needs xllamacpp, which runs adapters")
    save_model(tmp_path / "base", "llama2")
    save_trained(tmp_path / "base", tmp_path / "adapter", bits=4, dtype="fp32")
    rows = write_rows(tmp_path / "rows.jsonl")
    command = (*COMMAND, "--adapter", tmp_path / "adapter", "--verify", rows)
    answer = run(*command, "--max_kl", 1e-5)
    assert (answer.code, answer.err) == (0, "")
    assert "verified   by llama.cpp, on the base's own values in 4 bits, on " in answer.out
    assert "note: the adapter is for the base's own values in 4 bits, " in answer.out
    card = Path("out/README.md").read_text()
    assert "distance from the model as trained, on the base's own values in 4 bits: KL " in card
    assert "as `qlora-kit export --format gguf --merge_base none` writes it" in card
    report = json.loads(Path("out/export.json").read_text())
    assert report["kl"] < 1e-6
    assert report["verified_on"] == "rows.jsonl"
    assert not list(Path("out").glob("model*"))


def test_it_lies_beside_a_gguf_of_its_base(run: Run, tmp_path: Path) -> None:
    """`--merge_base none`: the same file as alone, and the base is what no adapter leaves it."""
    save_model(tmp_path / "base", "llama2")
    save_trained(tmp_path / "base", tmp_path / "adapter", bits=4, dtype="fp32")
    write_rows(tmp_path / "rows.jsonl")
    given = ("--adapter", tmp_path / "adapter", "--verify", "rows.jsonl", "--max_kl", 1e-5)
    flags = (*given, "--format", "gguf", "--merge_base", "none")
    answer = run("export", *flags, "--output_dir", "both", "--overwrite")
    assert (answer.code, answer.err) == (0, "")
    report = json.loads(Path("both/export.json").read_text())
    assert list(report["readers"]) == ["llama.cpp"]
    assert report["kl"] < 1e-6
    assert report["update_error"] == 0
    assert run(*COMMAND, *given).code == 0
    held, alone = (gguf.GGUFReader(f"{name}/adapter.gguf") for name in ("both", "out"))
    assert [one.name for one in held.tensors] == [one.name for one in alone.tensors]
    assert all(
        (one.data == other.data).all()
        for one, other in zip(held.tensors, alone.tensors, strict=True)
    )
    base = load_base(str(tmp_path / "base"), bits=4, dtype="fp32", device="cpu")
    export_model(base, tmp_path / "plain", adapter=None, format="gguf")
    written = (tmp_path / "plain" / "model-F32.gguf").read_bytes()
    assert Path("both/model-F32.gguf").read_bytes() == written
    ollama = Path("both/Modelfile").read_text()
    assert "FROM ./model-F32.gguf\nADAPTER ./adapter.gguf\n" in ollama
    assert (
        "llama-cli --model model-F32.gguf --lora adapter.gguf" in Path("both/README.md").read_text()
    )


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_ollama_writes_chats_as_the_run_did(run: Run, tmp_path: Path, format: str) -> None:
    save_model(tmp_path / "base", "llama2")
    adapter = tmp_path / "adapter"
    save_trained(tmp_path / "base", adapter, bits=16, dtype="fp32")
    template = "{{ strftime_now('%d.%m.%y') + mode }}{% for m in messages %}[{{ m.content }}]"
    (adapter / "chat_template.jinja").write_text(template + "{% endfor %}")
    chats = "chat_date: '2024-01-31'\nchat_template_args: mode=quick\n"
    (adapter / "config.yaml").write_text(f"data: rows.jsonl\n{chats}")
    write_rows(tmp_path / "rows.jsonl")
    flags = ("--adapter", adapter, "--verify", "rows.jsonl", "--format", format, "--dtype", "f32")
    answer = run("export", *flags, "--output_dir", "out")
    assert (answer.code, answer.err) == (0, "")
    ollama = Path("out/Modelfile").read_text()
    assert "31.01.24quick{{ end }}{{ range" in ollama
    assert "# It writes the day, here 2024-01-31: " in ollama


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_the_head_or_the_embedding_are_refused(
    run: Run, workshop: Any, tmp_path: Path, target: str
) -> None:
    save_peft(workshop.base, tmp_path / "peft", r=2, target_modules=["q_proj", target])
    answer = run(*COMMAND, "--adapter", tmp_path / "peft", "--bits", 16)
    assert answer.code == 3
    assert "target_modules asks for " in answer.line
    assert target in answer.line
    assert not Path("out").exists()


def test_options_of_a_merge_do_not_go_with_it(run: Run, workshop: Any) -> None:
    for flags in (("--merge_base", "original"), ("--dtype", "q8_0"), ("--with_towers",)):
        answer = run(*COMMAND, "--adapter", workshop.adapter, *flags)
        assert answer.code == 2
        assert flags[0].lstrip("-") in answer.line
