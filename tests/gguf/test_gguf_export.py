"""`gguf` as a format of an export: what is refused before a disk is touched, what is written."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from families import edit_config, refused, relative_error, save_checkpoint
from gguf_models import add_merge, by_transformers, save_model, some_ids
from trained import trained_base
from transformers import AutoModelForCausalLM

from qlora_kit.base.load import load_base
from qlora_kit.config.export import ExportConfig
from qlora_kit.errors import ConfigError, ModelError, NumericError
from qlora_kit.export.export import export_model
from qlora_kit.export.gguf import gguf_notes


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
def test_it_is_the_hf_export(merge_base: str, tmp_path: Path) -> None:
    """What was trained in 4 bits, on either base: both exports in fp32, by transformers."""
    save_model(tmp_path / "base", "llama2")
    base = trained_base(tmp_path / "base", bits=4, dtype="fp32", device="cpu")
    logits = {}
    for name in ("hf", "gguf"):
        place = export_model(
            base, tmp_path / name, format=name, dtype="fp32", merge_base=merge_base
        )
        file = place / "model-F32.gguf"
        read = (
            by_transformers(file)
            if name == "gguf"
            else AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager")
        )
        with torch.no_grad():
            logits[name] = read(some_ids()[None]).logits
    assert relative_error(logits["gguf"], logits["hf"]) <= 1e-5
    assert sorted(one.name for one in (tmp_path / "gguf").iterdir()) == [
        "Modelfile",
        "export.json",
        "model-F32.gguf",
    ]


def test_it_says_where_it_comes_from(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama2")
    base = load_base(str(tmp_path / "base"), bits=16, dtype="fp32", device="cpu")
    place = export_model(base, tmp_path / "out", adapter=None, format="gguf", dtype="q4_0")
    said = {
        name: field.contents()
        for name, field in gguf.GGUFReader(place / "model-Q4_0.gguf").fields.items()
    }
    assert said["general.name"] == said["general.base_model.0.name"] == "base"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert said["general.size_label"] == "133K"
    assert str(tmp_path) not in str(said)
    assert "FROM ./model-Q4_0.gguf" in (place / "Modelfile").read_text()
    # What an export made is replaced by the next one.
    export_model(base, place, adapter=None, format="gguf", dtype="f16", overwrite=True)
    assert (place / "model-F16.gguf").exists()
    assert not (place / "model-Q4_0.gguf").exists()


def test_what_is_in_another_type_is_said(tmp_path: Path) -> None:
    """Of what llama.cpp quantizes only the wide blocks: it takes 256 numbers of a row at once."""
    save_model(tmp_path / "base", "llama2")
    base = load_base(str(tmp_path / "base"), bits=16, dtype="bf16", device="cpu")

    def said(**options: str) -> list[str]:
        return list(gguf_notes(base, ExportConfig(format="gguf", **options)))

    known = said()
    for kind in ("Q8_0", "Q4_0", "Q5_1", "IQ4_NL"):
        assert said(quantize=kind) == known
    assert any(
        "not Q4_K_M: their rows are no multiple of 256" in s for s in said(quantize="Q4_K_M")
    )
    heads = [
        one for one in said(export_dtype="q4_0") if one.endswith("in Q8_0, not Q4_0: the head")
    ]
    assert heads


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmo2", {}, "'olmo2' is not written as GGUF, only gemma2, gemma3_text, granite, llama"),
        ("smollm3", {}, "no_rope_layers other than each 4th in models of smollm3"),
    ],
)
def test_it_is_refused_before_a_weight_is_read(
    family: str, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "base", family)
    add_merge(tmp_path / "base")
    edit_config(tmp_path / "base", **changes)
    base = load_base(str(tmp_path / "base"), bits=16, dtype="fp32", device="cpu")
    with refused(ModelError, words, directory=tmp_path):
        export_model(base, tmp_path / "out", adapter=None, format="gguf")


def test_a_number_that_fp16_does_not_hold_leaves_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama2")
    base = load_base(str(tmp_path / "base"), bits=16, dtype="fp32", device="cpu")
    base.model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 1e5
    said = ("blk.1.ffn_down.weight of the export in F16 holds 1 values", "wider --dtype")
    with refused(NumericError, *said, directory=tmp_path):
        export_model(base, tmp_path / "out", adapter=None, format="gguf", dtype="fp16")


@pytest.mark.parametrize("format", ["hf", "hf-4bit", "adapter"])
def test_types_of_blocks_go_with_gguf_alone(format: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype q8_0 goes with format gguf, not {format}"):
        ExportConfig(format=format, export_dtype="q8_0")


def test_other_options_are_refused_with_gguf() -> None:
    with pytest.raises(ConfigError, match="shard_size 1000000 goes with format hf") as caught:
        ExportConfig(format="gguf", shard_size=10**6, with_towers=True)
    assert "with_towers True goes with format hf" in str(caught.value)
