"""A config.json to transformers' model on the meta device, and which of its tensors are what.

Published files have names of other times: `embed_out` for a head, or a decoder without what the
class around it calls it. transformers' table of plain renamings (`conversion_mapping.py`) is read
for families without a record. What makes tensors out of others is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.fields import MODEL_FIELDS
from qlora_kit.base.generic import (
    attention_of,
    check_generic,
    declared_fields,
    parameters_on_meta,
    turn_off_dropout,
)
from qlora_kit.base.recurrence import avoid_fused_training, read_directly
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.errors import ModelError

DROPOUTS = {"attention_dropout", "resid_pdrop", "embd_pdrop"}
UNDECLARED = {
    # What the classes of some families read or convert without declaring it.
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


def build_on_meta(config: Mapping[str, Any], dtype: torch.dtype, path: Path) -> Any:
    """The architecture of `config` (read from `path`) on the meta device: shapes, no storage.

    Only fields whose values were checked reach the family's class, and of those only what it
    declares. The dropout that the base was pretrained with is off: it does not train here, and its
    masks are not keyed to the step. Errors: `ModelError`.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    record, family = architecture_of(config["model_type"]), CONFIG_MAPPING[config["model_type"]]
    try:
        described = (
            _described(config, family)
            if record.strict
            else (declared_fields(config, family, record.undeclared))
        )
        settings = family.from_dict(described)
        if record.known:
            _check_heads(settings, record.rope_needs)
        else:
            check_generic(settings, dtype, path)
        with parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=record.attention if record.known else attention_of(settings),
                trust_remote_code=False,
            )
        for name, table in model.named_buffers():
            if not table.isfinite().all():
                raise ValueError(f"{name} is not finite: its rope fields do not go together")
    except ModelError:
        raise
    except Exception as error:
        # transformers raises what its own validation and arithmetic happen to raise.
        raise ModelError(
            f"{path}: describes no model that can be built: {error}", "correct the file"
        ) from error
    turn_off_dropout(model)
    avoid_fused_training(model)
    _hold_tables(model)
    return model


def _hold_tables(model: nn.Module) -> None:
    """Let the second table of a long rotary embedding be there from the start, and be a buffer.

    transformers (5.23) makes it in the first step and keeps it where nothing counts it.
    """
    name = "long_inv_freq"
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64))
            if name in vars(module):
                module.register_buffer(name, vars(module).pop(name), persistent=False)


def _described(config: Mapping[str, Any], family: Any) -> dict[str, Any]:
    """The fields of `config` that the class of a family with a record gets."""
    declared = {field.name for field in dataclasses.fields(family)} | UNDECLARED
    described = {
        name: copy.deepcopy(config[name])
        for name in config
        if name in MODEL_FIELDS and name in declared
    }
    return described | dict.fromkeys(DROPOUTS & described.keys(), 0.0)


def _check_heads(settings: Any, needed: Sequence[str]) -> None:
    """Refuse heads that a rotary embedding cannot turn, and one without `needed`.

    Errors: `ValueError`.
    """
    for layers, rope in _ropes(settings):
        head_dim = getattr(layers, "head_dim", None)
        head_dim = head_dim or settings.hidden_size // settings.num_attention_heads
        share = rope.get("partial_rotary_factor") or 1.0
        # `proportional` turns the rest by an angle of 0.
        turned = head_dim if rope.get("rope_type") == "proportional" else int(head_dim * share)
        if turned < 2 or turned % 2:
            raise ValueError(
                f"{settings.num_attention_heads} heads of {head_dim} elements, of which {turned} "
                "are turned by the rotary embedding: an even number from 2 on"
            )
        for name in needed:
            if rope.get(name) is None:
                raise ValueError(f"its rope parameters lack {name}")
        for name in ("short_factor", "long_factor"):
            if name in rope and len(rope[name]) != turned // 2:
                raise ValueError(
                    f"{name} has {len(rope[name])} numbers for {turned // 2} rotary frequencies"
                )
    if getattr(settings, "num_kv_shared_layers", 0) and not settings.hidden_size_per_layer_input:
        # transformers 5.23 fails in its first forward then.
        raise ValueError("num_kv_shared_layers needs hidden_size_per_layer_input above 0")


def _ropes(settings: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """The settings of layers and of their rotary embedding: of all of them, or of each type."""
    rope = getattr(settings, "rope_parameters", None) or {}
    kinds = [kind for kind in set(getattr(settings, "layer_types", None) or ()) if kind in rope]
    for kind in kinds:
        yield settings.per_layer_config[kind], rope[kind] or {}
    if not kinds:
        yield settings, rope


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor that a checkpoint of `model` holds."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def entries_of(model: nn.Module, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The `entries` of files by the model's names, without those that nothing reads.

    Published Gemma 3n and 4 have keys and values of layers that read another one's.
    """
    unread = tuple(
        f"{name}.{leaf}."
        for name, module in model.named_modules()
        if getattr(module, "is_kv_shared_layer", False)
        for leaf in ("k_proj", "v_proj", "k_norm", "v_norm")
        if leaf not in module._modules
    )
    named = by_model_names(model, entries)
    return {name: entry for name, entry in named.items() if not name.startswith(unread)}


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A `config` whose embedding, and that of each layer where there is one, has so many rows."""
    changed = {**config, "vocab_size": rows}
    if config.get("vocab_size_per_layer_input") is not None:
        changed["vocab_size_per_layer_input"] = rows
    return changed


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantized, by module name: all but the output head.

    Nor those whose weight the model's own code reads, past their forward.
    """
    head, read = model.get_output_embeddings(), read_directly(model)  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in read
    }


def name_of_head(model: Any) -> str:
    """The name of the output head of a model."""
    head = model.get_output_embeddings()
    found: str = next(name for name, module in model.named_modules() if module is head)
    return found


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of tensors that share another one's storage, to that other name."""
    return dict(model.all_tied_weights_keys)


def generation_config_of(before: Any, said: Mapping[str, Any] | None, directory: Path) -> Any:
    """The generation settings that `directory` has, or those before. Errors: `ModelError`."""
    if said is None:
        return before
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(dict(said))
    except Exception as error:
        path = directory / "generation_config.json"
        raise ModelError(f"{path}: {error}", "correct or remove the file") from error


def by_model_names(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The `entries` of files by the names of `model`, without those that it computes by itself.

    A name that fits already stays, and so does one that no renaming makes fit.
    """
    found = dict(entries)
    expected = set(model.state_dict())
    if architecture_of(model.config.model_type).known or found.keys() <= expected:
        return found
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    rename = _renaming(model, expected)
    named: dict[str, TensorEntry] = {}
    for name, entry in found.items():
        if name not in expected and any(one.search(name) for one in ignored):
            continue
        ours = rename(name)
        # Two tensors that would have one name keep their own, so that both are shown.
        named[name if ours in found or ours in named else ours] = entry
    if expected - named.keys() and named.keys() - expected:
        _refuse_converted(model, named.keys() - expected)
    return named


def _refuse_converted(model: Any, names: Collection[str]) -> None:
    """Refuse `names` of tensors out of which transformers makes others. Errors: `ModelError`."""
    for one in get_model_conversion_mapping(model):
        if isinstance(one, WeightConverter):
            for source in one.source_patterns:
                pattern = re.compile(source.replace("*", r"\d+"))
                if found := next(filter(pattern.search, sorted(names)), None):
                    raise ModelError(
                        f"model_type {model.config.model_type!r}: transformers makes other tensors "
                        f"out of {found} while it loads (it splits or joins them), which is not "
                        "done here",
                        "use a model of another family",
                    )


def _renaming(model: Any, expected: set[str]) -> Callable[[str], str]:
    """What gives a name that `model` has for one that it has not, or that one itself."""
    pairs = [
        (re.compile(source), target.replace("\\.", "."))
        for one in get_model_conversion_mapping(model)
        if isinstance(one, WeightRenaming) and len(one.target_patterns) == 1
        for source, target in zip(one.source_patterns[:1], one.target_patterns, strict=True)
    ]
    prefix = f"{model.base_model_prefix}."

    def fits(name: str) -> bool:
        # A weight that is quantized has parts whose names go on.
        weight, dot, _ = name.partition(".weight")
        return name in expected or (bool(dot) and f"{weight}.weight" in expected)

    def rename(name: str) -> str:
        if fits(name):
            return name
        renamed = name
        for source, target in pairs:
            renamed = source.sub(target, renamed)
        for ours in (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix)):
            if fits(ours):
                return ours
        return name

    return rename
