"""Where the tensors of a model lie in a GGUF: their names there, and the order of their rows.

llama.cpp turns neighbouring rows of a head for some families, where transformers turns a row of
each half; their queries and keys are written in llama.cpp's order. A wrong order leaves the first
words of a text as they were, and no log-probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_kit.base.architecture import ARCHITECTURES, architecture_of
from qlora_kit.base.gguf_facts import Gguf
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.gguf.extras import INSTALL_GGUF


@dataclass(frozen=True)
class Layout:
    """The tensors of one model in a GGUF. Modules go by the names that transformers' model has."""

    facts: Gguf
    layers: int
    heads: int
    kv_heads: int
    names: Any
    """gguf's own map of names."""

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout of a model of this config of transformers.

        Errors: `ModelError` for a family that is not written, `ConfigError` where the package gguf
        is not installed.
        """
        facts, gguf = gguf_facts(config.model_type), import_gguf()
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = int(config.num_hidden_layers)
        names = gguf.get_tensor_name_map(known[facts.architecture], layers)
        heads = int(config.num_attention_heads)
        return cls(facts, layers, heads, int(config.num_key_value_heads), names)

    def name(self, module: str) -> str:
        """A module's name in the file: `model.layers.0.self_attn.q_proj` is `blk.0.attn_q`.

        Errors: `ModelError` for a module that llama.cpp has no place for.
        """
        name = self.names.get_name(module)
        if name is None:
            raise ModelError(
                f"{module}: llama.cpp has no such part in {self.facts.architecture} models",
                "export with --format hf",
            )
        return str(name)

    def rows(self, module: str, tensor: Tensor) -> Tensor:
        """A tensor (rows, ...) of a module in the order that its rows have in the file.

        It may be the weight, the bias or `lora_B`: whatever has a row for each output.
        """
        turned = {"q_proj": self.heads, "k_proj": self.kv_heads}
        heads = turned.get(module.rpartition(".")[2])
        if heads is None or not self.facts.pairs_rows:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)


def gguf_facts(model_type: str) -> Gguf:
    """What llama.cpp does in a family. Errors: `ModelError` for one that is not written."""
    found = architecture_of(model_type).gguf
    if found is not None:
        return found
    known = ", ".join(sorted(name for name, one in ARCHITECTURES.items() if one.gguf))
    raise ModelError(
        f"model_type {model_type!r} is not written as GGUF, only {known}",
        "export with --format hf",
    )


def import_gguf() -> Any:
    """The package gguf. Errors: `ConfigError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"the package gguf cannot be imported: {error}", INSTALL_GGUF) from error
    return gguf
