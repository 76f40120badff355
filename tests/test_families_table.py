"""Families in 4, 8 and 16 bits: trained, saved, read by PEFT, exported, read by transformers.

Each cell is done with the real commands on a tiny model, one family in all bits and the others in
one each in turn. All types in all bits: docs/models.md, by benchmarks/models.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from families import relative_error, save_checkpoint, token_ids
from peft import PeftModel
from safetensors.torch import load_file
from trained import write_rows
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.commands.main import main
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.adapter_files import read_adapter

BITS = (4, 8, 16)
FAMILIES = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "granite")
CELLS = [
    *(("llama3", bits) for bits in BITS),
    *((family, BITS[place % 3]) for place, family in enumerate(FAMILIES) if family != "llama3"),
]
TOLERANCE = 1e-5
"""As in the tests of single families: fp32 sums in another order."""


@dataclass
class Cell:
    """One family in one number of bits, and the files of its chain."""

    family: str
    bits: int
    folder: Path
    failed: dict[str, BaseException] = field(default_factory=dict)
    _model: Any = None

    @property
    def base(self) -> Path:
        return self.folder.parent / f"{self.family} base"

    @property
    def model(self) -> Any:
        """The base with the saved adapter, as this package loads both."""
        if self._model is None:
            loaded = load_base(str(self.base), bits=self.bits, dtype="fp32", device="cpu")
            self._model = load_adapter(loaded, self.folder / "adapter").model
        return self._model


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(), use_cache=False).logits  # type: ignore[no-any-return]


def train(cell: Cell) -> None:
    command(
        "finetune", "--model", cell.base, "--data", cell.folder.parent / "rows.jsonl",
        "--bits", cell.bits, "--dtype", "fp32", "--device", "cpu", "--eval_fraction", 0,
        "--target_modules", "all-linear", "--lora_r", 4, "--batch_size", 12,
        "--gradient_accumulation_steps", 1, "--max_steps", 4, "--learning_rate", 1e-2,
        "--warmup_steps", 0, "--token_cache", "none", "--output_dir", cell.folder / "adapter",
    )  # fmt: skip
    lines = [json.loads(line) for line in (cell.folder / "adapter" / "metrics.jsonl").open()]
    # All rows are in every batch.
    assert lines[-1]["loss"] < lines[0]["loss"]


def save(cell: Cell) -> None:
    assert read_adapter(cell.folder / "adapter").trained_on["bits"] == cell.bits
    with_adapter = logits(cell.model)
    alone = load_base(str(cell.base), bits=cell.bits, dtype="fp32", device="cpu").model
    assert relative_error(with_adapter, logits(alone)) > 100 * TOLERANCE


def peft_reads_it(cell: Cell) -> None:
    plain = AutoModelForCausalLM.from_pretrained(cell.base, dtype=torch.float32)
    for name, module in cell.model.named_modules():
        if isinstance(module, QuantizedLinear):
            own = plain.get_submodule(name.removesuffix(".base_layer"))
            own.weight.data = dequantize(module, torch.float32)
    theirs = PeftModel.from_pretrained(plain, cell.folder / "adapter")
    assert relative_error(logits(theirs), logits(cell.model)) <= TOLERANCE


def export(cell: Cell) -> None:
    command(
        "export", "--adapter", cell.folder / "adapter", "--model", cell.base, "--device", "cpu",
        "--verify", cell.folder.parent / "rows.jsonl", "--output_dir", cell.folder / "export",
    )  # fmt: skip
    written, original = (
        {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (cell.folder / "export", cell.base)
    )
    assert written == original


def transformers_reads_it(cell: Cell) -> None:
    exported, found = AutoModelForCausalLM.from_pretrained(
        cell.folder / "export", dtype="auto", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert relative_error(logits(exported), logits(cell.model)) <= TOLERANCE


CHAIN: dict[str, Callable[[Cell], None]] = {
    "train": train,
    "save": save,
    "PEFT reads it": peft_reads_it,
    "export": export,
    "plain transformers reads it": transformers_reads_it,
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Every chain as far as it goes, with the exception of the step where it ended."""
    root = tmp_path_factory.mktemp("table")
    write_rows(root / "rows.jsonl")
    done = []
    for family in FAMILIES:
        save_checkpoint(root / f"{family} base", family)
    for family, bits in CELLS:
        cell = Cell(family, bits, root / f"{family} {bits}")
        cell.folder.mkdir()
        for step, work in CHAIN.items():
            try:
                work(cell)
            except Exception as error:  # whatever it is, the cell does not work
                cell.failed = dict.fromkeys(list(CHAIN)[list(CHAIN).index(step) :], error)
                break
        cell._model = None
        done.append(cell)
    return done


def test_every_cell_works(cells: list[Cell]) -> None:
    assert {cell.family for cell in cells} == set(FAMILIES)
    assert {cell.bits for cell in cells} == set(BITS)
    failed = {
        (cell.family, cell.bits, step): repr(error)
        for cell in cells
        for step, error in cell.failed.items()
    }
    assert failed == {}
