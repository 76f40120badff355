"""Loading onto a device: the files' bytes go up once, in pieces, and nothing is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerator import accelerator, replaced, saved
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base import tensors
from qlora_kit.base.fill import fill
from qlora_kit.base.safetensors_file import TensorEntry, read_entries
from qlora_kit.lora.bank import AdapterBank


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_loading_copies_the_files_once_and_reads_nothing(bits: int) -> None:
    directory = saved("llama2")
    with unset_fake_temporarily():
        entries = read_entries(directory).values()
    largest = max(entry.end - entry.start for entry in entries)
    assert largest > 4096
    with accelerator() as card, replaced(tensors, "PIECE", 4096):
        base = card.open(directory, bits=bits)
        with card.watch() as seen:
            model = fill(base, lambda entry, into: None)
        buffers = [one.nbytes for one in model.buffers()]
    assert seen.reads == seen.copied_out == []
    pieces = [one.nbytes for one in seen.copied_in]
    assert max(pieces) <= 4096
    # Of a loop a plan traces some turns only.
    assert sum(pieces) <= sum(entry.end - entry.start for entry in entries) + sum(buffers)


class Unread:
    """Stands for the reader of files: tensors of the device have no values."""

    def __enter__(self) -> Unread:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, entry: TensorEntry, into: Tensor) -> None:
        pass


def test_adding_an_adapter_copies_its_file_once_and_reads_one_number(tmp_path: Path) -> None:
    directory = saved("llama2")
    with unset_fake_temporarily():
        weights = {}
        for number in range(2):
            key = f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_"
            weights |= {f"{key}A.weight": torch.ones(4, 64), f"{key}B.weight": torch.ones(64, 4)}
        save_file(weights, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        nbytes = sum(weight.nbytes for weight in weights.values())
    with accelerator() as card, replaced(tensors, "Reader", Unread):
        base = card.open(directory, bits=4)
        fill(base, lambda entry, into: None)
        bank = AdapterBank(base)
        with card.watch(may_read=True) as seen:
            bank.add("a", tmp_path)
            bank.use("a")
        held = [weight for part in bank.rows(["a"]).parts.values() for weight in part.weights]
        assert {weight.device for weight in held} == {base.device}
    assert len(held) == 4
    assert len(seen.reads) <= 1
    assert seen.copied_out == []
    assert sum(one.nbytes for one in seen.copied_in) == nbytes
