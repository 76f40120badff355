"""PEFT, transformers and bitsandbytes as PEFT's guide to quantization puts them together.

`prepare_model_for_kbit_training` casts what is not quantized to fp32, autocast computes in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peers import step_dtype

REENTRANT = {"use_reentrant": False}
QUERY_AND_VALUE = ["q_proj", "v_proj"]


def load(directory: Path, bits: int, device: str) -> Any:
    """The base, quantized to nf4 with double quant or to int8, or in bf16."""
    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=step_dtype(device),
        )
    elif bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantization,
        dtype=step_dtype(device),
        device_map={"": device},
    )


class Peer:
    """A model with its optimizer; `step` trains on ids (B, T), every token supervised.

    The base is loaded from a directory, or is a `model` that is quantized already.
    """

    autocast = True
    fused = False  # of the guide's optimizer nothing more is said

    def __init__(
        self,
        directory: Path | None,
        bits: int,
        level: str,
        rank: int,
        device: str,
        *,
        targets: str | list[str] = QUERY_AND_VALUE,
        learning_rate: float = 1e-4,
        model: Any = None,
    ) -> None:
        self.device = device
        if model is None:
            assert directory is not None
            model = load(directory, bits, device)
        model = self.prepare(model, bits, level == "full")
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, config, autocast_adapter_dtype=self.autocast)
        self.model.config.use_cache = False
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=learning_rate, weight_decay=0.0, fused=self.fused or None
        )
        self.model.train()

    def prepare(self, model: Any, bits: int, recompute: bool) -> Any:
        """What the guide does before the adapters."""
        if bits < 16:
            return prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=recompute,
                gradient_checkpointing_kwargs=REENTRANT,
            )
        if recompute:
            model.gradient_checkpointing_enable(REENTRANT)
        return model

    def step(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """One optimizer step; its loss. Labels (B, T) are the ids where none are given."""
        loss = self.loss(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def loss(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss over the supervised tokens, in nats."""
        ids = ids.to(self.device)
        labels = ids if labels is None else labels.to(self.device)
        kind = torch.device(self.device).type
        autocast = self.autocast and step_dtype(self.device) is torch.bfloat16
        with torch.autocast(kind, torch.bfloat16, enabled=autocast):
            found: Tensor = self.model(input_ids=ids, labels=labels).loss
        return found
