"""A config.json to transformers' model on the meta device, and which of its tensors are what."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit.base.families import FAMILIES
from qlora_kit.base.source import contained
from qlora_kit.base.validate import read_json
from qlora_kit.errors import ModelError

DROPOUTS = {"attention_dropout", "resid_pdrop", "embd_pdrop"}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
IGNORED = ("quantization_config", "auto_map")


def build_on_meta(config: Mapping[str, Any], dtype: torch.dtype, path: Path) -> Any:
    """The architecture of `config` (read from `path`) on the meta device: shapes, no storage.

    The dropout that the base was pretrained with is off: it does not train here, and its masks
    are not keyed to the step. Errors: `ModelError`.
    """
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    described = {name: copy.deepcopy(config[name]) for name in config if name not in IGNORED}
    described |= dict.fromkeys(DROPOUTS & config.keys(), 0.0)
    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(described)
        # Buffers are real: rotary tables are computed when the modules are made.
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=FAMILIES[config["model_type"]],
                trust_remote_code=False,
            )
    except Exception as error:
        # transformers raises what its own validation and arithmetic happen to raise.
        raise ModelError(
            f"{path}: describes no model that can be built: {error}", "correct the file"
        ) from error


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor that a checkpoint of `model` holds."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantized, by module name: all but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def tied_names(model: Any) -> dict[str, str]:
    """Names of tensors that share another one's storage, to that other name."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def take_generation_config(model: Any, directory: Path) -> None:
    """Give `model` the generation settings of its directory. Errors: `ModelError`."""
    if not (directory / "generation_config.json").exists():
        return
    from transformers import GenerationConfig

    path = contained(directory, "generation_config.json")
    said = read_json(path)
    for name in TOKENS & said.keys():
        ids = said[name] if isinstance(said[name], list) else [said[name]]
        if said[name] is not None and not all(type(one) is int for one in ids):
            raise ModelError(
                f"{path}: {name} is {str(said[name])[:60]}, not a token", "correct or remove it"
            )
    try:
        model.generation_config = GenerationConfig.from_dict(said)
    except Exception as error:
        raise ModelError(f"{path}: {error}", "correct or remove the file") from error
