"""The models of the GPU benchmark, and the points that are planned beforehand and measured.

The sizes are those of the published models; `small` ones have the same form and train on a CPU in
a moment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "llama2-7b": LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama3.2-1b": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "head_dim": 64,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "gemma2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "head_dim": 256,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
SHORTER = 32
"""Times as short as the real rows those of a small model are."""
SHORT_ROW = 200
"""Tokens of a row in a pack."""


def shape_of(name: str, small: bool) -> dict[str, Any]:
    """The config.json of a model."""
    config = SHAPES[name]
    if not small:
        return config
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    changed = config | SMALL | {"num_key_value_heads": max(1, 4 // shared)}
    for name, value in {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 128}.items():
        if name in changed:
            changed[name] = value
    return changed


def write_shape(name: str, small: bool, folder: Path) -> Path:
    """Write the config.json of a model; its path."""
    path = folder / f"{name}{'-small' if small else ''}.json"
    path.write_text(json.dumps(shape_of(name, small)))
    return path


def short(length: int, small: bool) -> int:
    """A number of tokens, or what stands for it with small models."""
    return max(16, length // SHORTER) if small else length


@dataclass(frozen=True)
class Point:
    """A step to be planned and measured: `rows` rows of `length` tokens, or packs of short rows.

    `card` is what it is planned for, where that is not a card of today.
    """

    model: str
    length: int
    level: str
    rows: int = 1
    micro_steps: int = 1
    packed: bool = False
    dtype: str = "bf16"
    targets: str = "all-linear"
    card: str | None = None

    @property
    def name(self) -> str:
        """Such as `llama3.1-8b, 1 x 2048, full`."""
        times = f"{self.micro_steps} x ({self.rows} x {self.length})"
        shape = times if self.micro_steps > 1 else f"{self.rows} x {self.length}"
        more = [" packed"] if self.packed else []
        more += [f", {self.dtype}"] if self.dtype != "bf16" else []
        more += [f", for {self.card}"] if self.card else []
        return f"{self.model}, {shape}{''.join(more)}, {self.level}"

    def row_lengths(self, small: bool) -> list[int]:
        """The tokens of each row of a sequence."""
        length = short(self.length, small)
        if not self.packed:
            return [length]
        row = max(16, SHORT_ROW // (8 if small else 1))
        return [min(row, length - start) for start in range(0, length, row)]


BIG, OLDER, LITTLE, CAPPED = "llama3.1-8b", "llama2-7b", "llama3.2-1b", "gemma2-2b"
MEMORY = (
    *(Point(BIG, 2048, level) for level in ("full", "selective", "none")),
    Point(BIG, 8192, "full"),
    Point(BIG, 4096, "none", packed=True),
    Point(BIG, 8192, "full", packed=True),
    Point(BIG, 16384, "full"),
)
MEMORY_OLDER = (Point(OLDER, 2048, "full"), Point(OLDER, 2048, "none"))
SPEED = (
    Point(BIG, 2048, "none"),
    Point(BIG, 2048, "full"),
    Point(BIG, 512, "none"),
    Point(BIG, 512, "full"),
    Point(BIG, 512, "none", rows=8),
    Point(BIG, 256, "none", rows=8),
    Point(BIG, 256, "none", micro_steps=8),
)
T4 = "t4"
OLD_CARDS = (
    Point(LITTLE, 2048, "none", dtype="fp16", card=T4),
    Point(LITTLE, 2048, "none", dtype="fp32", card=T4),
    Point(CAPPED, 4096, "full"),
    Point(LITTLE, 16384, "full"),
)
PLANNED = tuple(dict.fromkeys((*MEMORY, *MEMORY_OLDER, *SPEED, *OLD_CARDS)))
