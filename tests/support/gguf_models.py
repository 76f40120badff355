"""GGUF files of tiny models, and what llama.cpp and transformers' reader give for them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import save_checkpoint, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.export import ExportConfig
from qlora_kit.export.gguf import gguf_file, write_gguf
from qlora_kit.export.llamacpp import LlamaCpp

LONG = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
"""llama.cpp has no context below 256 tokens: of up to these it takes the short factors, and of the
16 that the tiny models have otherwise the long ones, as transformers for a text of 20."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {}),
    "llama3": ("llama3", {}),
    "llama_bias": ("llama_bias", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma2_full": (
        "gemma2",
        {
            "query_pre_attn_scalar": 32,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 64,
        },
    ),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "num_hidden_layers": 6}),
    "gemma3_untied": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": False,
            "final_logit_softcapping": None,
        },
    ),
    "phi3_long": ("phi3", {}),
    "phi4_mini": ("phi4_mini", LONG),
    "granite": ("granite", {"attention_bias": True, "rope_parameters": LINEAR}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
}
"""Models of every family that is written, by what is special about each."""


@dataclass(frozen=True)
class Written:
    """A model, and its file."""

    base: Base
    file: Path

    def logits(self, ids: Tensor) -> Tensor:
        """The model's own, (T, vocabulary)."""
        with torch.no_grad():
            logits: Tensor = self.base.model(ids[None]).logits[0]
        return logits


def save_model(directory: Path, name: str, **changes: Any) -> None:
    """A checkpoint of one of `WRITTEN`."""
    family, special = WRITTEN[name]
    save_checkpoint(directory, family, **(special | changes))
    add_merge(directory)


def add_merge(directory: Path) -> None:
    """Give a tokenizer of bytes one merge: a GGUF has no empty lists."""
    path = directory / "tokenizer.json"
    said = json.loads(path.read_text())
    said["model"]["vocab"]["ab"] = len(said["model"]["vocab"])
    said["model"]["merges"] = [["a", "b"]]
    path.write_text(json.dumps(said))


def write_model(directory: Path, name: str, dtype: str = "fp32", **changes: Any) -> Written:
    """A model of `WRITTEN` as a GGUF of a dtype, beside its checkpoint."""
    source, target = directory / "model", directory / "gguf"
    save_model(source, name, **changes)
    target.mkdir(exist_ok=True)
    base = load_base(str(source), bits=16, dtype="fp32", device="cpu")
    return written(base, target, dtype)


def written(base: Base, directory: Path, dtype: str) -> Written:
    """A base as a GGUF of a dtype."""
    options = ExportConfig(format="gguf", export_dtype=dtype)
    write_gguf(base, None, options, directory)
    return Written(base, directory / gguf_file(base, None, options).name)


def some_ids(length: int = 20) -> Tensor:
    """Random tokens of a text, longer than the sliding windows of the families."""
    return token_ids(1, length)[0]


def distance(model: Written, ids: Tensor, context: int = 64) -> tuple[float, float]:
    """llama.cpp's mean KL from the model on some tokens in nats, and the share of equal tops."""
    with LlamaCpp(model.file, context=context) as reader:
        theirs = torch.cat(list(reader.scores(ids.tolist()))).double().log_softmax(-1)
    ours = model.logits(ids).double().log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return (kl if math.isfinite(kl) else math.inf), agreed


def by_transformers(file: Path, config: Any = None) -> Any:
    """The model as transformers reads it out of a file; `config` where that says too little."""
    more = {} if config is None else {"config": config}
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="eager", **more
    ).eval()
