"""The model card of an export: its `README.md`, with the YAML that the hub reads at its head.

It says what the export was made of, how far it is from what was trained, and how it is loaded. It
holds no path: the base is named where others find it by that name.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from qlora_kit.config.export import LORA_FILE
from qlora_kit.export.adapter_files import CARD, FOLDER
from qlora_kit.export.gguf_lora import own_values
from qlora_kit.files.atomic import write_file
from qlora_kit.gguf.extras import llama_command

LOADERS = {
    "hf": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained("DIR")',
    "multimodal": "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
    'model = AutoModelForImageTextToText.from_pretrained("DIR", dtype="auto")\n'
    'processor = AutoProcessor.from_pretrained("DIR")',
    "unmerged": "from peft import PeftModel\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
    f'model = PeftModel.from_pretrained(model, "DIR", subfolder="{FOLDER}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("DIR")',
}


def write_card(report: Mapping[str, Any], directory: Path, base_name: str | None) -> None:
    """Write the `README.md` of the export that lies in `directory`.

    `report` is what its export.json says; `base_name` is None where others do not find the base.
    """
    form, base = report["format"], report["base"]
    is_gguf, adapter = form.startswith("gguf"), directory / FOLDER
    if is_gguf:
        adapter = directory / LORA_FILE
    beside = adapter.name if form != "gguf-lora" and adapter.exists() else None
    front = ModelCardData(
        base_model=base_name,
        library_name="gguf" if is_gguf else "peft" if beside else "transformers",
        tags=["qlora", *(["gguf"] if is_gguf else [])],
    )
    name = base_name or base["name"]
    title = "LoRA adapter for" if form == "gguf-lora" else "Fine-tuned"
    said = "A LoRA adapter trained on a quantized base, exported by qlora-kit."
    if "adapter" not in report:
        title, said = "Quantized", "A base quantized by qlora-kit, as it trains adapters on it."
    made = "\n".join(f"- {line}" for line in _made_of(report, name, beside))
    text = f"""---
{front.to_yaml()}
---
# {title} {code(name)}

{said} `export.json` holds every number.

## What it is
{made}

## Use
{_use(report, directory)}
"""
    write_file(directory / CARD, text.encode())


def _made_of(report: Mapping[str, Any], name: str, beside: str | None) -> Iterator[str]:
    base = report["base"]
    held = f"{base['bits']} bits" if base["bits"] != 16 else "16 bits, not quantized"
    held += f" ({base['quant_type']})" if base.get("quant_type") else ""
    yield f"format: {report['format']}, {report.get('quantize') or report['dtype']}"
    yield f"base: {code(name)}, revision {code(base['revision'] or 'none')}"
    merged = {
        "dequantized": ", the update added to the weights as training multiplied by them",
        "original": f", the update added to the original weights, not to those in {held}",
    }
    verb = "trained with the base" if "adapter" in report else "the base"
    yield f"{verb} in {held}{merged.get(str(report.get('merge_base')), '')}"
    if beside:
        yield f"not merged: the base lies here, and the adapter in `{beside}`"
    where = own_values(base["bits"]) if report["format"] == "gguf-lora" else ""
    if where:
        yield (
            f"for a GGUF of {where}, as `qlora-kit export --format gguf --merge_base none` writes "
            "it: on one of the original base it is another model"
        )
    if report.get("kl") is not None:
        yield (
            f"distance from the model as trained{where and f', on {where}'}: "
            f"KL {report['kl']:.2e} nats a token, top-1 agreement {report['top1_agreement']:.1%}, "
            f"largest logit difference {report['max_logit_difference']:.3g}, "
            f"on {report['tokens']} tokens"
        )


def _use(report: Mapping[str, Any], directory: Path) -> str:
    """How it is loaded, by the files that are there; `DIR` is where they are."""
    files = sorted(path.relative_to(directory) for path in directory.glob("*.gguf"))
    if not files:
        loader = "multimodal" if report.get("with_towers") else "hf"
        if (directory / FOLDER).is_dir():
            loader = "unmerged"
        where = "`DIR` is the name of this repository, or its directory."
        return "\n".join((where, "```python", LOADERS[loader], "```"))
    lines = [shlex.join(llama_command("llama-cli", files))]
    if (directory / "Modelfile").exists():
        lines.append("ollama create NAME -f Modelfile")
    return "\n".join(("```", *lines, "```"))


def code(text: str) -> str:
    """`text` as inline code that neither ends early nor breaks the line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
