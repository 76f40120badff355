"""What servers refuse of an adapter or leave out, each rule once, on adapters as they are saved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint
from safetensors.torch import load_file, save_file
from trained import save_peft, trained_base

from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.lora.serving import Served, vllm_command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "base"
    save_checkpoint(directory, "llama2", torch.float32)
    return directory


def saved(base: Path, directory: Path, **options: Any) -> Served:
    lora = LoRAConfig(target_modules=("q_proj", "v_proj"), **options)
    save_adapter(trained_base(base, bits=16, dtype="fp32", lora=lora), directory)
    return Served.of_files(read_adapter(directory))


def peft_saved(base: Path, directory: Path, **settings: Any) -> Served:
    save_peft(base, directory, target_modules=["q_proj", "v_proj"], **settings)
    return Served.of_files(read_adapter(directory))


@pytest.mark.parametrize(
    ("r", "given"), [(1, 1), (4, 8), (8, 8), (16, 16), (24, 32), (64, 64), (300, 320), (512, 512)]
)
def test_vllm_is_given_the_next_rank_that_it_takes(r: int, given: int) -> None:
    served = Served(rank=r)
    command = vllm_command(served, "owner/name", Path("out"))
    assert command is not None
    words = shlex.split(command)
    assert words[words.index("--max-lora-rank") + 1] == str(given)
    # Its default is 16, so nothing need be known below.
    note = served.rank_note()
    assert (note is None) == (given <= 16)
    assert note is None or f"rank {r} with --max-lora-rank {given};" in note
    assert not list(served.notes())


def test_a_rank_that_vllm_does_not_take_is_said() -> None:
    served = Served(rank=513)
    assert served.rank_note() is None
    (note,) = served.notes()
    assert note.startswith("vLLM serves no rank above 512, and this is 513")
    assert vllm_command(served, "owner/name", Path("out")) is None


def test_a_plain_adapter_has_nothing_to_be_said(base: Path, tmp_path: Path) -> None:
    served = saved(base, tmp_path / "adapter")
    assert served == Served(rank=16)
    assert not list(served.notes())
    command = vllm_command(served, "owner/name", tmp_path / "adapter")
    assert command is not None
    words = "vllm serve owner/name --enable-lora --max-lora-rank 16 --lora-modules"
    assert shlex.split(command) == [*words.split(), f"adapter={tmp_path / 'adapter'}"]
    # The chat template that it was trained with is in its own tokenizer.
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")
    command = vllm_command(served, "owner/name", tmp_path / "adapter")
    assert command is not None
    assert f"--tokenizer {tmp_path / 'adapter'} " in command


def test_rslora_is_lost_in_the_converter_of_llama_cpp(base: Path, tmp_path: Path) -> None:
    served = saved(base, tmp_path / "adapter", use_rslora=True)
    (note,) = served.notes()
    assert note.startswith("llama.cpp's own converter does not read use_rslora, and scales by")
    assert vllm_command(served, "owner/name", tmp_path) is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"alpha_pattern": {"v_proj": 3}},
            ["llama.cpp's own converter does not read alpha_pattern", "vLLM before 0.32 does not"],
        ),
        # llama.cpp divides alpha by the rank of each pair.
        ({"rank_pattern": {"v_proj": 24}}, ["vLLM before 0.32 does not read rank_pattern"]),
    ],
)
def test_ranks_and_alphas_of_modules_are_lost_in_older_servers(
    base: Path, tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    served = peft_saved(base, tmp_path / "adapter", r=8, **settings)
    notes = list(served.notes())
    assert len(notes) == len(words)
    for note, start in zip(notes, words, strict=True):
        assert note.startswith(start)
    assert served.rank == max(8, *settings.get("rank_pattern", {"": 0}).values())


def test_full_weights_beside_an_adapter_are_left_out(base: Path, tmp_path: Path) -> None:
    peft_saved(base, tmp_path / "adapter", r=4)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, name: torch.zeros(3, 4)}, path)
    served = Served.of_files(read_adapter(tmp_path / "adapter"))
    (note,) = served.notes()
    assert f"full weights beside A and B ({name})" in note
    assert vllm_command(served, "owner/name", tmp_path) is None


@pytest.mark.parametrize(("family", "found"), [("gemma3", False), ("qwen2_vl", True)])
def test_names_of_a_text_model_are_not_found_on_the_whole_checkpoint(
    base: Path, tmp_path: Path, family: str, found: bool
) -> None:
    saved(base, tmp_path)
    config = read_adapter(tmp_path).config
    served = Served.of(config, {"wrapper": family, "adapter_keys": "text"})
    notes = [note for note in served.notes() if "names of the text model alone" in note]
    assert bool(notes) == (not found) == (vllm_command(served, "a/b", Path("x")) is None)
    assert not list(Served.of(config, {"wrapper": family, "adapter_keys": "wrapper"}).notes())


def test_rows_that_no_file_has_are_said(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path)
    (note,) = Served.of(read_adapter(tmp_path).config, {"embedding_rows": 300}).notes()
    assert note.startswith("it was trained with 300 embedding rows, which no file of the base has")
