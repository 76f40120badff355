"""Directories of every kind that a command is given, as real tools write them: what is damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from families import QUANTIZED, save_checkpoint, save_quantized
from fp8_files import save_fp8
from trained import save_trained, write_rows

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"
FILES = {
    # What is damaged: the directory that it is in, and its name there.
    "weights": ("plain", "model.safetensors"),
    "index": ("sharded", INDEX),
    "shard": ("sharded", SHARD),
    "config": ("plain", "config.json"),
    "generation config": ("plain", "generation_config.json"),
    "tokenizer": ("plain", "tokenizer.json"),
    "tokenizer config": ("plain", "tokenizer_config.json"),
    "chat template": ("plain", "chat_template.jinja"),
    "special tokens": ("stories", "special_tokens_map.json"),
    "stories' tokenizer": ("stories", "tokenizer.json"),
    "stories' weights": ("stories", "model.safetensors"),
    "sentencepiece": ("sentencepiece", "tokenizer.model"),
    "4-bit weights": ("nf4_double", "model.safetensors"),
    "4-bit weights, scales in fp32": ("nf4", "model.safetensors"),
    "4-bit config": ("nf4_double", "config.json"),
    "8-bit weights": ("int8", "model.safetensors"),
    "8-bit floats": ("floats", "model.safetensors"),
    "8-bit floats' config": ("floats", "config.json"),
    "adapter config": ("adapter", "adapter_config.json"),
    "adapter weights": ("adapter", "adapter_model.safetensors"),
    "adapter's run": ("adapter", "config.yaml"),
}
TEMPLATE = """{% for message in messages %}<s>{{ message['role'] }}: {% generation %}\
{{ message['content'] }}</s>{% endgeneration %}{% endfor %}"""


def make_originals(root: Path) -> None:
    """The directories whose copies are damaged, each of them accepted as it is."""
    save_checkpoint(root / "plain", "llama_bias")
    (root / "plain" / "chat_template.jinja").write_text(TEMPLATE)
    save_checkpoint(root / "sharded", shard_size="150KB")
    save_checkpoint(root / "half", "llama_bias", torch.bfloat16)
    for kind in ("nf4_double", "nf4", "int8"):
        save_quantized(root / "half", root / kind, **QUANTIZED[kind])
    save_fp8(root / "forms", "ministral", "llama_bias")
    (root / "forms" / "fp8").rename(root / "floats")
    shutil.rmtree(root / "forms")
    save_trained(root / "plain", root / "adapter", bits=4, dtype="fp32")
    (root / "adapter" / "config.yaml").write_text("model: plain\nbits: 4\nlora_r: 4\nseed: 3\n")
    write_rows(root / "rows.jsonl", 3)
    stories = Path(os.environ.get("QLORA_KIT_DATA", "none")) / "models" / "stories260K"
    if stories.is_dir():
        for name in ("stories", "sentencepiece"):
            shutil.copytree(stories, root / name, copy_function=shutil.copyfile)
            (root / name).chmod(0o755)
            (root / name / "chat_template.jinja").write_text(TEMPLATE)
        (root / "sentencepiece" / "tokenizer.json").unlink()
