"""Gradients of tiny models of every family on the device, against those of the CPU in fp32.

The checkpoints, adapters and references are made beforehand (`gpu_prepare.py`), by the package on
the CPU. Compared in fp32 and in the compute dtype of the card; by bits and level; packed rows
against the same rows apart; and two runs of one step against each other, which differ where kernels
add in no fixed order.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_parts.setting import Setting
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss, to_device
from qlora_kit.training.prepare import prepare_model

BITS, LEVELS = (4, 8, 16), ("none", "selective", "full")
BOUND = 1e-3
"""fp32 on tiny random models: products sum in another order, and steep models carry that on."""
TIMES = 3.0
"""As far from fp32 as bf16 is on the CPU, times this, a device may be in bf16."""
LENGTHS = (24, 17, 9)


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Every family that was prepared."""
    if setting.prepared is None:
        return "no prepared families"
    folders = sorted(path for path in (setting.prepared / "families").iterdir() if path.is_dir())
    folders = folders[:1] if setting.small else folders
    wrong: list[str] = []
    found["wrong"] = wrong
    for folder in folders:
        found[folder.name] = of_family = {}
        for bits, dtype in itertools.product(BITS, ("fp32", "bf16")):
            of_family[f"{bits} bits, {dtype}"] = one = _compared(setting, folder, bits, dtype)
            if not max(one["worst"], one["packs_apart"]) <= one["bound"]:
                wrong.append(f"{folder.name}, {bits} bits, {dtype}: {one['worst']:.2g}")
    slow = [name for name, one in found.items() if name != "wrong" and "not_fused" in str(one)]
    more = f"; not fused: {slow}" if slow else ""
    return f"{len(folders)} families, {len(wrong)} wrong{f' ({wrong[0]})' if wrong else ''}{more}"


def _compared(setting: Setting, folder: Path, bits: int, dtype: str) -> dict[str, Any]:
    reference = load_file(folder / f"reference-{bits}.safetensors")
    model, note = prepared_model(folder, bits, dtype, setting.device)
    batch = rows_batch()
    found: dict[str, Any] = {} if note is None else {"not_fused": note}
    found["bound"] = BOUND if dtype == "fp32" else TIMES * float(reference["in_bf16"])
    worst = 0.0
    for level in LEVELS:
        set_recompute(model, level)
        loss, gradients = gradients_of(model, batch)
        found[level] = one = {
            "loss": abs(loss / float(reference["loss"]) - 1),
            "gradients": apart(gradients, reference),
        }
        worst = max(worst, *one.values())
    _, again = gradients_of(model, batch)
    found["two_runs"] = apart(again, gradients)
    found["packs_apart"] = _packs_apart(model)
    return {**found, "worst": worst}


def prepared_model(
    folder: Path, bits: int, dtype: str, device: torch.device
) -> tuple[Any, str | None]:
    """A tiny base with the adapters that lie beside it, ready for a step; why it is not fused."""
    base = load_base(str(folder), bits=bits, dtype=dtype, device=device.type)
    model = inject_lora(base.model, LoRAConfig(r=4, alpha=8, target_modules="all-linear"))
    draw_adapters(model)
    note = prepare_model(model, TrainingConfig(), "none")
    model.train()
    return model, note


def draw_adapters(model: Any) -> None:
    """Random adapters, the same on every device: B of zeros would hide half of the gradients."""
    drawn = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) * 0.1)


def rows_batch() -> Batch:
    """Rows of different lengths, padded."""
    return collate(_rows(), 0)


def gradients_of(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of a batch, and its gradients by name, in fp32 on the CPU."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = supervised_loss(model, to_device(batch, model.device)) / batch["num_supervised"]
    loss.backward()
    found = {
        name: parameter.grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), found


def _packs_apart(model: Any) -> float:
    """Gradients of one pack against those of its rows side by side; 0 where packs are refused."""
    try:
        _, packed = gradients_of(model, collate_packs([_rows()], 0))
    except Exception as error:
        if type(error).__name__ != "ConfigError":
            raise
        return 0.0
    _, beside = gradients_of(model, rows_batch())
    return apart(packed, beside)


def _rows() -> list[Encoded]:
    drawn = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 264, (length,), generator=drawn).tolist() for length in LENGTHS]
    return [Encoded(row, row) for row in rows]


def apart(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm, over all gradients together."""
    difference = sum(float((ours[n] - reference[n]).double().square().sum()) for n in ours)
    return (difference / sum(float(reference[n].double().square().sum()) for n in ours)) ** 0.5
