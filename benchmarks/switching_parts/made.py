"""A base with random weights and adapters in files, and PEFT's model of the same."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear4bit
from random_checkpoint import make_base_files
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.inject import ADAPTER, clear_adapter, inject_lora, lora_layers

TINY = Path(__file__).resolve().parents[2] / "qlora_kit/assets/tiny"
RANK = 16


def make_base(shape: dict[str, Any], directory: Path, bits: int) -> Base:
    """A base of that config with random weights, in files and loaded in bf16."""
    make_base_files(shape, directory, TINY)
    base = load_base(str(directory), bits=bits, dtype="bf16", device="cpu")
    base.model.eval()
    return base


def save_adapters(base: Base, folder: Path, names: Sequence[str], r: int, targets: str) -> None:
    """Adapters with random A and B, in our files, which are PEFT's; the base has none of them."""
    for seed, name in enumerate(names):
        inject_lora(base.model, LoRAConfig(r=r, alpha=2 * r, target_modules=targets), seed=seed)
        for layer in lora_layers(base.model).values():
            layer.lora_B[ADAPTER].weight.data.normal_(0, 0.01)  # type: ignore[union-attr]
        save_adapter(base, folder / name)
        clear_adapter(base.model, ADAPTER)


def peft_adapters(directory: Path, folder: Path, names: Sequence[str], *, as_guided: bool) -> Any:
    """PEFT on transformers' and bitsandbytes' base in 4 bits, in evaluation mode, with adapters.

    As its users have it, or without what transformers' and PEFT's defaults do on the way: weights
    that bitsandbytes lays out again for a kernel in bf16 (on CPUs with AVX512-BF16), and adapters
    cast to fp32.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.bfloat16
    )
    options = {"autocast_adapter_dtype": as_guided}
    model: Any = PeftModel.from_pretrained(base, folder / names[0], names[0], **options)
    for name in names[1:]:
        model.load_adapter(folder / name, name, **options)
    if not as_guided:
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.base_layer.support_avx512bf16_for_cpu = False
    return model.eval()


def peft_of_many(directory: Path, names: Sequence[str], r: int, targets: list[str]) -> Any:
    """PEFT's model of a small base in 16 bits with new adapters, for switches alone."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    return model.eval()
