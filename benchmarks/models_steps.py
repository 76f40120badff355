"""The steps of the chain that one model_type is taken through, each a law or a command."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_laws as laws
import torch
from families import relative_error, token_ids
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.commands.main import main
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.errors import QloraKitError, error_line
from qlora_kit.lora.adapter import load_adapter

LIMIT = laws.TOLERANCE


class FaultError(Exception):
    """A law does not hold."""


class RefusedError(Exception):
    """A command ended with a line that says why."""


@dataclass
class Cell:
    """One type in one number of bits: its files, its measurements."""

    base: Path
    bits: int
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    alone: dict[str, torch.Tensor] = field(default_factory=dict)
    _trained: Any = None

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def trained(self) -> Any:
        """The base with the saved adapter, as this package loads both."""
        if self._trained is None:
            loaded = load_base(str(self.base), bits=self.bits, dtype="fp32", device="cpu")
            self._trained = load_adapter(loaded, self.adapter).model.eval()
        return self._trained

    @property
    def multimodal(self) -> bool:
        return "text_config" in json.loads((self.base / "config.json").read_text())

    @property
    def limit(self) -> float:
        """What may lie between gradients in fp32: more where autograd's own rounding is more."""
        return max(LIMIT, 2 * self.found.get("autograd_in_fp32", 0.0))

    def law(self, name: str, error: float, what: str = "", limit: float = LIMIT) -> None:
        """Note an error; a fault where it is too large."""
        self.found[name] = float(f"{error:.2g}")
        if not error <= limit:
            raise FaultError(f"{name} {error:.2g} {what}".strip())


def line_of(error: QloraKitError, folder: Path) -> str:
    """The line that a command ends with, without this machine's paths."""
    shortened = re.sub(r"\S*\.\.\.\S*/base\b", "base", error_line(error))
    return shortened.replace(f"{folder}/", "").removeprefix("error: ")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(), use_cache=False).logits  # type: ignore[no-any-return]


def command(cell: Cell, name: str, *arguments: object) -> None:
    """Run a command; its last line is raised where it fails."""
    said = cell.folder / "said"
    with said.open("w") as file, contextlib.redirect_stderr(file):
        code = main([name, *map(str, arguments)])
    if code:
        lines = said.read_text().splitlines() or [""]
        last = lines[-1].replace(f"{cell.base.parent}/", "")
        if code in (2, 3, 4, 5):
            raise RefusedError(last.removeprefix("error: "))
        raise FaultError(f"{name} ended with {code}: {last}")


def load(cell: Cell) -> None:
    model, note = laws.prepared(cell.base, cell.bits)
    cell.found["code"] = note or "fused blocks"
    cell.model, cell.alone = model, laws.alone(model)
    weights = [p for n, p in model.named_parameters() if ".lora_" not in n]
    quantized = sum(
        one.in_features * one.out_features
        for one in model.modules()
        if isinstance(one, QuantizedLinear)
    )
    cell.found["in_16_bits"] = round(1 - quantized / (quantized + _elements(weights)), 4)


def _elements(weights: Sequence[torch.Tensor]) -> int:
    return sum(one.numel() for one in weights if one.is_floating_point())


def logits_are_the_references(cell: Cell) -> None:
    reference = laws.reference_of(cell.model, cell.base, torch.float32)
    cell.law("logits", laws.logits_error(cell.model, reference))


def gradients_are_autograds(cell: Cell) -> None:
    error, tensor, dtype, rounding = laws.gradient_error(cell.model, cell.alone, cell.base)
    cell.found["gradients_in"] = dtype
    if LIMIT < error <= 2 * rounding:
        cell.found["gradients"] = float(f"{error:.2g}")
        cell.found["autograd_in_fp32"] = float(f"{rounding:.2g}")
        return
    cell.law("gradients", error, tensor)


def levels_are_equal(cell: Cell) -> None:
    if differ := laws.levels_differ(cell.model):
        raise FaultError(f"recompute {', '.join(differ)} differs from none")


def padding_changes_nothing(cell: Cell) -> None:
    batch = [collate(laws.rows(), 0)]
    found = laws.worst(laws.results_of(cell.model, batch), cell.alone)
    cell.law("right_padding", *found, limit=cell.limit)
    error, tensor = laws.worst(laws.left_padded(cell.model), cell.alone)
    if error <= cell.limit:
        cell.law("left_padding", error, limit=cell.limit)
        return
    # A run pads on the right alone; on the left some families of transformers read the padding.
    reference = laws.reference_of(cell.model, cell.base, torch.float32)
    theirs, _ = laws.left_padding_of_reference(reference)
    if theirs <= LIMIT:
        raise FaultError(f"left padding {error:.2g} {tensor}")
    cell.found["left_padding"] = f"transformers' own model differs by {theirs:.2g}"


def train(cell: Cell) -> None:
    command(
        cell, "finetune", "--model", cell.base, "--data", cell.base.parent.parent / "rows.jsonl",
        "--bits", cell.bits, "--dtype", "fp32", "--device", "cpu", "--eval_fraction", 0,
        "--target_modules", "all-linear", "--lora_r", 4, "--batch_size", 12,
        "--gradient_accumulation_steps", 1, "--max_steps", 4, "--learning_rate", 1e-2,
        "--warmup_steps", 0, "--token_cache", "none", "--output_dir", cell.adapter,
        "--gradient_checkpointing", "full",
    )  # fmt: skip
    lines = [json.loads(line) for line in (cell.adapter / "metrics.jsonl").open()]
    cell.found["losses"] = [round(line["loss"], 3) for line in lines]
    if not lines[-1]["loss"] < lines[0]["loss"]:  # all rows are in every batch
        raise FaultError("the loss does not fall")


def peft_reads_it(cell: Cell) -> None:
    plain = AutoModelForCausalLM.from_pretrained(cell.base, dtype=torch.float32)
    for name, module in cell.trained.named_modules():
        if isinstance(module, QuantizedLinear):
            own = laws.same_module(plain, name.removesuffix(".base_layer"))
            own.weight.data = dequantize(module, torch.float32)
    before = logits(plain)
    theirs = PeftModel.from_pretrained(plain, cell.adapter)
    if relative_error(logits(theirs), before) <= 100 * LIMIT:
        raise FaultError("the adapter changes nothing")
    cell.law("peft", relative_error(logits(theirs), logits(cell.trained)))


def export(cell: Cell) -> None:
    given = [
        "--adapter", cell.adapter, "--model", cell.base, "--device", "cpu",
        "--verify", cell.base.parent.parent / "rows.jsonl", "--output_dir", cell.folder / "export",
    ]  # fmt: skip
    try:
        command(cell, "export", *given)
    except RefusedError as refused:
        if "--with_towers" not in str(refused):
            raise
        cell.found["text_alone"] = str(refused)
        command(cell, "export", *given, "--with_towers")
    written, original = (
        {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (cell.folder / "export", cell.base)
    )
    # Of a multimodal checkpoint the text model is written, by the text model's names.
    if written != original and not cell.multimodal:
        raise FaultError("the export has other tensors than the base")


def transformers_reads_it(cell: Cell) -> None:
    exported, found = AutoModelForCausalLM.from_pretrained(
        cell.folder / "export", dtype="auto", output_loading_info=True
    )
    if found["missing_keys"] or found["unexpected_keys"]:
        raise FaultError(f"keys that do not fit: {str(found)[:200]}")
    cell.law("export", relative_error(logits(exported), logits(cell.trained)))


def pack(cell: Cell) -> None:
    """Packs are isolated, or the command refuses them."""
    try:
        packed = laws.results_of(cell.model, [collate_packs([laws.rows()], 0)])
    except QloraKitError as error:
        cell.found["packing"] = line_of(error, cell.base.parent)
        return
    apart, tensor = laws.worst(packed, cell.alone)
    if apart <= LIMIT:
        cell.found["packing"] = float(f"{apart:.2g}")
        return
    try:
        command(
            cell, "finetune", "--model", cell.base, "--packing", "true",
            "--data", cell.base.parent.parent / "rows.jsonl",
            "--bits", cell.bits, "--dtype", "fp32", "--device", "cpu", "--eval_fraction", 0,
            "--lora_r", 4, "--max_steps", 1, "--token_cache", "none",
            "--output_dir", cell.folder / "packed",
        )  # fmt: skip
    except RefusedError as refused:  # with the line that a user reads
        cell.found["packing"] = str(refused)
        return
    raise FaultError(f"packs leak ({apart:.2g} {tensor}) and are not refused")


CHAIN: dict[str, Callable[[Cell], None]] = {
    "load": load,
    "logits": logits_are_the_references,
    "gradients": gradients_are_autograds,
    "recompute": levels_are_equal,
    "padding": padding_changes_nothing,
    "packing": pack,
    "train": train,
    "PEFT reads it": peft_reads_it,
    "export": export,
    "transformers reads it": transformers_reads_it,
}
