"""PEFT's own merge: the update added to dequantized weights, and the sum quantized again.

bitsandbytes 0.50 dequantizes 4-bit weights wrong on processors with AVX512 where the rows are no
multiple of the block size. That is no fault of PEFT's, so here it is called with a shape for which
it is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

AS_IT_IS = bitsandbytes.functional.dequantize_4bit


def merged_by_peft(base: Path, adapter: Path, bits: int, quant_type: str) -> Any:
    """The model that `merge_and_unload` leaves, its quantized weights as plain bf16 numbers."""
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, **options)
    bitsandbytes.functional.dequantize_4bit = _dequantize_by_blocks
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        plain = AutoModelForCausalLM.from_pretrained(base, **options)
        with torch.no_grad():
            for name, module in plain.named_modules():
                weight = getattr(merged.get_submodule(name), "weight", None)
                if isinstance(weight, bitsandbytes.nn.Params4bit):
                    module.weight.copy_(_dequantize_by_blocks(weight.data, weight.quant_state))
                elif isinstance(weight, bitsandbytes.nn.Int8Params):
                    state = merged.get_submodule(name).state
                    scales = weight.SCB if weight.SCB is not None else state.SCB
                    state.SCB = scales
                    module.weight.copy_(dequantize_bnb_weight(weight, state=state))
    finally:
        bitsandbytes.functional.dequantize_4bit = AS_IT_IS
    return plain


def _dequantize_by_blocks(packed: Tensor, state: Any) -> Tensor:
    """What `dequantize_4bit` gives, asked for in rows of one block each."""
    shape, size = state.shape, state.blocksize
    assert shape.numel() % size == 0
    state.shape = torch.Size((shape.numel() // size, size))
    try:
        return AS_IT_IS(packed, state).view(shape)
    finally:
        state.shape = shape
