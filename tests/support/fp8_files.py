"""Tiny checkpoints of 8-bit floats, in each form that is published, and the numbers they mean.

The blocks of `blocks` and `exponents` are transformers' own quantizing (`Fp8Quantize`); the other
forms differ in the scales' shapes, names and words in config.json, as their tools write them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from families import edit_config, edit_weights, save_checkpoint
from transformers.integrations.finegrained_fp8 import Fp8Quantize

LARGEST = 448.0
"""Of an 8-bit float (e4m3)."""
ONES = {"dynamic": False, "num_bits": 8, "symmetric": True, "type": "float"}
FORMS: dict[str, dict[str, Any]] = {
    # DeepSeek's and Qwen's.
    "blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]},
    "exponents": {"quant_method": "fp8", "weight_block_size": [32, 16], "scale_fmt": "ue8m0"},
    # Ministral 3's: one scale a tensor, and one for its activations.
    "ministral": {
        "quant_method": "fp8",
        "weight_block_size": None,
        "activation_scheme": "static",
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
    },
    # AutoFP8's.
    "auto": {"quant_method": "fp8", "activation_scheme": "static"},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": ONES | {"strategy": "channel"}}
        },
        "ignore": ["lm_head"],
    },
    "tensor": {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": ONES | {"strategy": "tensor"}}
        },
    },
    "grid": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": ONES | {"strategy": "block", "block_structure": [32, 16]},
            }
        },
    },
    "fbgemm": {"quant_method": "fbgemm_fp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
}
"""`quantization_config` of each form."""


def quantized(
    form: str, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, str, torch.Tensor]:
    """8-bit floats, their scales, the name of those, and the numbers in fp32 that they mean."""
    said = FORMS[form]
    suffix = "weight_scale_inv" if form in ("blocks", "exponents", "ministral") else "weight_scale"
    number = weight.float()
    if form in ("blocks", "exponents"):
        settings = SimpleNamespace(
            weight_block_size=said["weight_block_size"], scale_fmt=said.get("scale_fmt", "float")
        )
        rows, columns = (-size % block for size, block in zip(weight.shape, (32, 16), strict=True))
        padded = torch.nn.functional.pad(number, (0, columns, 0, rows))
        made = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert(
            {"a.weight": padded}
        )
        floats, scales = made["a.weight"], made["a.weight_scale_inv"]
        wide = scales.float().repeat_interleave(32, 0).repeat_interleave(16, 1)
        meant = (floats.float() * wide)[: weight.shape[0], : weight.shape[1]]
        return floats[: weight.shape[0], : weight.shape[1]].contiguous(), scales, suffix, meant
    if form == "grid":
        floats, scales, _, meant = quantized("blocks", weight)
        return floats, scales.bfloat16(), suffix, floats.float() * _wide(scales.bfloat16(), weight)
    if form in ("channel", "fbgemm"):
        scales = number.abs().amax(1, keepdim=True) / LARGEST
    else:
        scales = number.abs().max() / LARGEST
    scales = scales.bfloat16() if form in ("channel", "ministral") else scales
    floats = (number / scales.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    if form in ("tensor", "modelopt"):
        scales = scales.reshape(1) if form == "tensor" else scales
    return floats, scales, suffix, floats.float() * scales.float()


def _wide(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = scales.float().repeat_interleave(32, 0).repeat_interleave(16, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def save_fp8(
    directory: Path,
    form: str,
    family: str = "llama2",
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> None:
    """Two checkpoints: `directory/fp8`, and `directory/numbers` of the same numbers in `dtype`."""
    for name in ("fp8", "numbers"):
        save_checkpoint(directory / name, family, dtype, **changes)
    skipped = ("lm_head", "embed_tokens", *FORMS[form].get("modules_to_not_convert", ()))

    def change(tensors: dict[str, torch.Tensor], *, numbers: bool) -> None:
        for name, weight in list(tensors.items()):
            owner = name.removesuffix(".weight")
            if weight.dim() != 2 or any(one in name for one in skipped):
                continue
            floats, scales, suffix, meant = quantized(form, weight)
            if numbers:
                tensors[name] = meant.to(dtype).contiguous()
                continue
            tensors |= {name: floats, f"{owner}.{suffix}": scales.contiguous()}
            if form == "ministral":
                tensors[f"{owner}.activation_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)
            if form in ("auto", "modelopt"):
                tensors[f"{owner}.input_scale"] = torch.tensor(0.5)

    edit_weights(directory / "fp8", lambda tensors: change(tensors, numbers=False))
    edit_weights(directory / "numbers", lambda tensors: change(tensors, numbers=True))
    edit_config(directory / "fp8", quantization_config=FORMS[form])
