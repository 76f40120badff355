"""The model card: the `README.md` beside an adapter, with the YAML that the hub reads at its head.

It names the base and the data by their last component where they are local paths: it is published
with the adapter, and where things lie on the trainer's disk is nobody else's business.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from qlora_kit.base.source import is_path
from qlora_kit.config.base import DEFAULT_BITS
from qlora_kit.errors import redacted
from qlora_kit.export.adapter_files import STAYS_BEHIND
from qlora_kit.export.card import code
from qlora_kit.options.checks import size_text


def model_card(run: Mapping[str, Any], *, is_chat: bool = False) -> str:
    """The Markdown of the adapter's `README.md`, with the YAML that the hub reads at its head.

    `is_chat` says that the rows were chats, so that prompts have to be put into the template.
    """
    config, model, data = run["config"], run["model"], run["data"]
    train, memory = run["train"], run["memory"]
    base, targets = _public_name(model["name"]), config.get("target_modules")
    front = ModelCardData(base_model=base, library_name="peft", tags=["lora", "qlora"])
    result = [
        f"training loss: {_number(train['first_loss'])} at the first step, "
        f"{_number(train['last_loss'])} at the last",
        f"speed: {_number(train['tokens_per_s'], '.0f')} tokens/s, "
        f"{_number(train['seconds'], '.0f')} s in all",
        f"peak memory on {code(memory['device'])}: {_peak(memory['measured'])} measured, "
        f"{_peak(memory.get('planned', {}))} planned",
    ]
    if evaluation := run["eval"]:
        result.insert(0, _held_out(evaluation))
    return f"""---
{front.to_yaml()}
---
# LoRA adapter for {code(base)}

Trained with qlora-kit.{STAYS_BEHIND}

## Training
- base: {code(base)}, revision {code(model["revision"] or "none")}, \
held in {_form(config)}
- data: {code(_public_name(str(config.get("data"))))}, {data["rows"]:,} rows \
({data["skipped"]:,} skipped), {data["tokens"]:,} tokens, \
{data["supervised_tokens"]:,} of them supervised
- LoRA: r {config.get("lora_r")}, alpha {config.get("lora_alpha")}, \
dropout {config.get("lora_dropout")}, on \
{code(", ".join(targets) if isinstance(targets, list) else str(targets))}: \
{model["trainable_parameters"]:,} parameters beside {model["parameters"]:,}
- optimization: {train["steps"]:,} steps, learning rate {config.get("learning_rate")} \
({config.get("lr_scheduler_type")}), seed {config.get("seed")}, \
{config.get("per_device_train_batch_size")} x {config.get("gradient_accumulation_steps")} \
rows a step{_keys_line(model.get("adapter_keys"))}

## Result
{chr(10).join(f"- {line}" for line in result)}

## Use
`ADAPTER` is the directory of this file.
```
qlora-kit generate --adapter ADAPTER{" --chat" if is_chat else ""} --prompt TEXT
```
```python
{_peft_example(config, model.get("adapter_keys"), model.get("source_dtype", ""))}
```
"""


def _held_out(evaluation: Mapping[str, Any]) -> str:
    """The held-out loss in words."""
    over = f"in nats a token over {evaluation['tokens']:,} supervised tokens"
    if "margin_before" in evaluation:
        over = (
            f"of pairs, whose margin was {_number(evaluation['margin_before'])} and is "
            f"{_number(evaluation['margin_after'])}: above zero in "
            f"{_number(evaluation['accuracy_after'], '.1%')} of them"
        )
    before, after = _number(evaluation["loss_before"]), _number(evaluation["loss_after"])
    return f"held-out loss: {before} before, {after} after, {over}"


def _form(config: Mapping[str, Any]) -> str:
    """How the base was held, in words."""
    bits = config.get("bits", DEFAULT_BITS)
    form = {4: f"4 bits, {config.get('quant_type')}", 16: "16 bits, not quantized"}.get(
        bits, f"{bits} bits"
    )
    if config.get("double_quant"):
        form += ", double quantization"
    if skip := config.get("skip_modules"):
        form += f", but for {code(skip if isinstance(skip, str) else ', '.join(skip))}"
    if (head := config.get("head_bits", 16)) < 16:
        form += f"; the head in {head} bits"
    return form


def _keys_line(keys: str | None) -> str:
    """What of a multimodal model the adapter's names are those of; nothing for a text model."""
    said = {
        "wrapper": "of the multimodal class: PEFT and servers that load the whole model read it",
        "text": "of the text model alone: it does nothing on the whole multimodal model",
    }
    return "" if keys is None else f"\n- names: {said[keys]}"


def _peft_example(config: Mapping[str, Any], keys: str | None, source_dtype: str) -> str:
    """The lines that put the adapter on its base, quantized as it was in training.

    With the names of a text model (`keys`) its base is an export of the decoder alone.
    Where the base is says the adapter's own config: the card itself holds no path.
    A base of 8-bit floats is held in 16 bits, for transformers does not quantize it again.
    """
    compute = {"bf16": "bfloat16", "fp16": "float16"}.get(config.get("dtype", ""), "float32")
    settings = {
        4: f"load_in_4bit=True, bnb_4bit_quant_type={config.get('quant_type')!r}, "
        f"bnb_4bit_use_double_quant={bool(config.get('double_quant'))}, "
        f"bnb_4bit_compute_dtype={compute!r}",
        8: "load_in_8bit=True",
    }.get(config.get("bits", DEFAULT_BITS))
    if settings and (skip := config.get("skip_modules")):
        # The names of the head come first: transformers takes the list in place of its own.
        names = [skip] if isinstance(skip, str) else [rf"(.*\.)?{re.escape(one)}" for one in skip]
        settings += f", llm_int8_skip_modules={['lm_head', *names]!r}"
    if "float8" in source_dtype:
        settings = None
    loader, place = "AutoModelForCausalLM", "said.base_model_name_or_path, revision=said.revision"
    if keys == "wrapper":
        loader = "AutoModelForImageTextToText"
    elif keys == "text":
        place = '"TEXT_MODEL"'  # what qlora-kit export writes of the decoder alone
    lines = [
        "from peft import PeftConfig, PeftModel",
        f"from transformers import {loader}, AutoTokenizer, BitsAndBytesConfig",
        "",
        f"quantization = {f'BitsAndBytesConfig({settings})' if settings else None}",
        'said = PeftConfig.from_pretrained("ADAPTER")',
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
        f"base = {loader}.from_pretrained(",
        f'    {place}, dtype="auto", quantization_config=quantization',
        ")",
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
    ]
    if config.get("resize_embeddings"):
        # The new rows are the mean of the others, as transformers draws them but for 1e-9 of it.
        lines.insert(-1, "base.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)")
    return "\n".join(lines)


def _public_name(name: str) -> str:
    if is_path(name):
        name = os.path.basename(os.path.abspath(os.path.expanduser(name)))
    return redacted(name)


def _number(value: float | None, form: str = ".4f") -> str:
    # A record read back from run.json has None where a number was not finite.
    return format(value, form) if value is not None and math.isfinite(value) else "not finite"


def _peak(components: Mapping[str, int]) -> str:
    return size_text(components["peak"]) if "peak" in components else "not"
