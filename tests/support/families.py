"""Tiny checkpoints of every family, made by transformers' own `save_pretrained`.

Each configuration keeps what sets its family apart. Weights are random and larger than a fresh
model's, norms and biases included, so that a tensor that goes astray changes the logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processor import processor_s
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from qlora_kit import errors
from qlora_kit.errors import QloraKitError, error_line

VOCABULARY = 264  # a few rows more than tokens, as real models have
LAYERS = 2
EXIT_CODES = {
    errors.ConfigError: 2,
    errors.ModelError: 3,
    errors.TokenizerError: 3,
    errors.AdapterError: 3,
    errors.UnsafeInputError: 3,
    errors.ResourceError: 4,
    errors.NumericError: 5,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 173,  # odd: rows are no multiple of a quantization block
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WINDOWED = ["sliding_attention", "full_attention"]
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
TRAITS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        "rope_scaling": LONG_ROPE,
        "original_max_position_embeddings": 16,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(TRAITS)
"""Those that every law is tried on; the ones below have tests of their own."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
DENSE: dict[str, dict[str, Any]] = {
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
    },
    "smollm3_window": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        # As published: the layers without a window alone have a longer context.
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {k: v for k, v in YARN.items() if k != "llama_4_scaling_beta"},
        },
    },
    "ministral3": {"model_type": "ministral3", "head_dim": 32, "rope_parameters": YARN},
    "granite4": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * LAYERS,
        "shared_intermediate_size": 173,
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "granite4_nope": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * LAYERS,
        "shared_intermediate_size": 173,
        "position_embedding_type": None,
        "mamba_n_heads": 4,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
    },
    "glm": {"model_type": "glm", "head_dim": 32, "partial_rotary_factor": 0.5},
    "glm4": {"model_type": "glm4", "head_dim": 32, "partial_rotary_factor": 0.5},
    "phi4": {"model_type": "phi3"},
    "phi4_mini": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.02 * i for i in range(6)],
            "long_factor": [1.5 + 0.5 * i for i in range(6)],
        },
        "original_max_position_embeddings": 16,
        "tie_word_embeddings": True,
    },
    "exaone4": {
        "model_type": "exaone4",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "layer_types": WINDOWED,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 66,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "layer_types": WINDOWED,
        "tie_word_embeddings": True,
    },
    "gemma4_dense": {
        "model_type": "gemma4_text",
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 8,
        "layer_types": WINDOWED,
        "tie_word_embeddings": True,
    },
}
LIKE_LLAMA: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "cwm": {
        "model_type": "cwm",
        "head_dim": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "seed_oss": {
        "model_type": "seed_oss",
        "head_dim": 32,
        "residual_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 32, "use_bias": True},
    "helium": {"model_type": "helium", "head_dim": 16},
}
"""Those whose record has nothing: no more than Llama's block and norms, rotations found in it."""
TRAITS |= DENSE | LIKE_LLAMA
TRAITS["gemma3n"] = {
    # Through its own code: several streams of hidden states, layers that share keys and values.
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size": 174,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 66,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "final_logit_softcapping": 3.0,
    "sliding_window": 8,
    "layer_types": WINDOWED,
    "tie_word_embeddings": True,
}
FROM_ZERO = ("gemma2", "gemma3")
"""Families whose norms multiply by 1 + weight."""
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
"""What transformers is asked for where it saves a quantized checkpoint."""


def tiny_model(family: str = "llama2", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' own model of a family, random but always the same, in evaluation mode."""
    settings = {**SIZES, **TRAITS[family], **changes}
    if "layer_types" in settings:
        # The last ones of a pattern: some families have to end with attention to everything.
        count = settings["num_hidden_layers"]
        settings["layer_types"] = (settings["layer_types"] * count)[-count:]
    if "num_kv_shared_layers" in settings:
        # Each kind of layer needs one that is not shared.
        settings["num_kv_shared_layers"] = max(0, settings["num_hidden_layers"] - 2)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(7)
    # sdpa leaves out the soft cap of attention, so the reference takes the plain product.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else 0.3 if "embed" in name else 0.15
        around = 1.0 if "norm" in name and family not in FROM_ZERO else 0.0
        torch.nn.init.normal_(parameter, mean=around, std=spread)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return model.to(dtype).eval()


def save_checkpoint(
    directory: Path,
    family: str = "llama2",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **changes: Any,
) -> Any:
    """Write a tiny checkpoint with its tokenizer; returns transformers' model of it."""
    model = tiny_model(family, dtype, **changes)
    model.save_pretrained(directory, max_shard_size=shard_size)
    save_tokenizer(directory)
    return model


def save_quantized(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
    skip: list[str] | None = None,
    **kind: Any,
) -> Any:
    """Write transformers' own quantized save of `source`; `kind` is what `QUANTIZED` has."""
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
    model.save_pretrained(target)
    save_tokenizer(target)
    return model


def save_tokenizer(directory: Path, extra: int = 0) -> None:
    """A tokenizer of bytes, which encodes any text; `extra` adds that many unused tokens."""
    # <|endoftext|> is there because transformers adds it to whatever a Qwen 2 directory holds.
    specials = ["<pad>", "<s>", "</s>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *alphabet, *(f"<extra{i}>" for i in range(extra))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def token_ids(rows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    """Random tokens, longer than the sliding windows and the short rope of the families."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(directory: Path, change: Any, file: str = "model.safetensors") -> None:
    """Rewrite a safetensors file after `change(tensors)` edited its dict."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, {"format": "pt"})


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of the reference."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def tree_hash(directory: Path) -> str:
    """SHA-256 over the names, kinds, links and bytes below a directory; pipes are not opened."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)} {path.lstat().st_mode}\n".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def refused(
    error: type[QloraKitError], *said: str, directory: Path, seconds: float = 2.0
) -> Iterator[None]:
    """The block raises `error`, whose line says all of `said`, in time, with nothing changed.

    The time is the processor's; a block that hangs is ended after sixty times `seconds`.
    """

    def hangs(*_: Any) -> None:
        raise AssertionError(f"no answer in {60 * seconds} s")

    before = tree_hash(directory)
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 60 * seconds)
    began = processor_s()
    try:
        with pytest.raises(QloraKitError) as caught:
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    took = processor_s() - began
    line = error_line(caught.value)
    assert type(caught.value) is error, line
    assert caught.value.exit_code == EXIT_CODES[error]
    assert caught.value.remedy
    for words in said:
        assert words in str(caught.value)
    assert len(line) <= 400
    assert took < seconds
    assert tree_hash(directory) == before


def randomize_adapter(model: torch.nn.Module, seed: int = 5, scale: float = 0.1) -> None:
    """Give every lora_A and lora_B of a model (ours or PEFT's) random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn * scale)
