"""An adapter that looks trained, on a tiny base: A as it was drawn, B no longer zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.inject import inject_lora, lora_layers


def trained_base(
    directory: Path, *, spread: float = 0.03, lora: LoRAConfig | None = None, **options: Any
) -> Base:
    """The base in `directory` with an adapter, evaluating; `options` are those of `load_base`."""
    base = load_base(str(directory), **options)
    inject_lora(base.model, lora or LoRAConfig(r=4, alpha=6, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(11)
    for layer in lora_layers(base.model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * spread)
    base.model.eval()
    return base


def save_trained(directory: Path, adapter: Path, **options: Any) -> Base:
    """The same, and its adapter saved in `adapter`."""
    base = trained_base(directory, **options)
    save_adapter(base, adapter)
    return base


def save_peft(base: Path, directory: Path, *, r: int, **settings: Any) -> Any:
    """An adapter that PEFT makes and saves, its B no longer zero; returns PEFT's model in fp32."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    return model


def write_rows(path: Path, count: int = 12) -> Path:
    """Rows of prompt and completion, short and of different lengths."""
    rows = []
    for n in range(count):
        answer = " ".join(map(str, range(n, n + 1 + n % 4)))
        rows.append(json.dumps({"prompt": f"count {n}:", "completion": f" {answer}"}))
    path.write_text("\n".join(rows) + "\n")
    return path
