"""A loaded base with its adapters as PEFT's model on bitsandbytes' layers, in memory, and back.

    model = to_peft(base)             # trainers of transformers and TRL take it
    from_peft(model, base)            # and our commands' functions take the base again

The packed bytes are the same tensors: bitsandbytes' layers are made around them one by one, so that
no weight is there twice and nothing is loaded again. transformers' flags say that the model is
quantized, without which its trainers refuse it or save what no program reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_kit.base.base import Base
from qlora_kit.base.bnb_tensors import hold_as_ours, hold_as_theirs, quantization_config
from qlora_kit.base.in_fp32 import hold_narrow, hold_wide
from qlora_kit.base.load import allow_saving
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import AdapterError, ConfigError, NumericError
from qlora_kit.export.bnb_linears import BnbLinears
from qlora_kit.lora.adapter import adapter_config, load_adapter, prefix_to_save
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.lora.inject import (
    ADAPTER,
    activate,
    active_adapter,
    adapter_names,
    check_name,
    lora_layers,
    switch_of,
)
from qlora_kit.lora.opening import open_adapter
from qlora_kit.training.prepare import restore_model

FLAGS = ("is_quantized", "quantization_method", "hf_quantizer")


def to_peft(base: Base) -> Any:
    """`base.model`, in place, as a `peft.PeftModel` with its adapters, the active one trainable.

    The adapters' weights are the fp32 masters. Matrices that are held in 16 bits and computed with
    in fp32 are in fp32 while it is PEFT's, which casts no weight. Nothing of this package takes the
    base then; `from_peft` gives it back. An `AdapterBank` is of the layers that PEFT's replace, and
    refuses from then on.

    Errors: `ConfigError` where PEFT is not installed or the head is in 8 or 4 bits, `AdapterError`
    for a base without an adapter or with a bank's that takes part, `ResourceError` for a streamed
    base or a shape that bitsandbytes would get wrong; the base is then as it was.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("to_peft: peft is not installed", "pip install peft") from error
    model: Any = base.model
    names, active = adapter_names(model), active_adapter(model)
    if not names:
        raise AdapterError("to_peft: the model has no adapter", "inject or load one first")
    if base.quantization.head_bits < 16:
        raise ConfigError(
            f"to_peft: the head is in {base.quantization.head_bits} bits, which PEFT has no layer "
            "for",
            "load the base with head_bits=16",
        )
    configs, masters, dtypes, linears = {}, {}, {}, None
    for name in names:
        layers = {at: one for at, one in lora_layers(model).items() if name in one.lora_A}
        said = adapter_config(base, name, prefix_to_save(base, name))
        # Every linear by its whole name: PEFT adapts those, and no tower's.
        said |= {"inference_mode": False, "target_modules": sorted(layers)}
        configs[name] = peft.LoraConfig(**said)
        masters[name] = {at: one.weights(name) for at, one in layers.items()}
        dtypes[name] = next(iter(layers.values())).adapter_dtypes[name]
    if base.quantization.bits < 16:
        linears = BnbLinears.of(base, base.quantization.bits)
        hold_as_theirs(model, base.dtype)
    restore_model(model)
    allow_saving(model)
    switch_of(model).left = True
    for at, layer in lora_layers(model).items():
        model.set_submodule(at, layer.base_layer)
    hold_wide(base)
    if linears is not None:
        _say_quantized(base, linears)
    made: Any = peft.PeftModel(model, configs[names[0]], names[0])
    for name in names[1:]:
        made.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, weights in masters.items():
            for at, (down, up) in weights.items():
                layer = model.get_submodule(at)
                layer.lora_A[name].weight.data = down.data
                layer.lora_B[name].weight.data = up.data
    made.set_adapter(active or names[0])
    made.dtypes_of_base = dtypes
    return made


def from_peft(model: Any, base: Base) -> Base:
    """The base of `to_peft` with PEFT's adapters, trained or added since, in place of its own.

    The active adapter takes part; nothing is trainable, which `train_loaded` changes. One that came
    from here is computed and saved in the dtype that it had here, its masters being what PEFT has;
    another one in the dtype that PEFT saves it in. Errors:
    `AdapterError` for a model that was not made of this base, one with adapters merged into it, or
    an adapter that is not plain LoRA on linears that take one; `NumericError` for one that is not
    finite. The model is then as it was.
    """
    inner: Any = base.model
    made_of = getattr(model, "get_base_model", None)
    if made_of is None or made_of() is not inner:
        raise AdapterError(
            "from_peft: the model was not made of this base", "give the base of to_peft"
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        # PEFT leaves them in the weights, and they would count twice.
        raise AdapterError(
            "from_peft: adapters are merged into the weights",
            "model.unmerge_adapter() first; 4 or 8 bits are then not those that were loaded",
        )
    active = model.active_adapter
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = _checked(inner, folder, list(model.peft_config))
        model.unload()
        hold_as_ours(inner)
        for flag in (*FLAGS, f"is_loaded_in_{base.quantization.bits}bit"):
            inner.__dict__.pop(flag, None)
        if hasattr(inner.config, "quantization_config"):
            del inner.config.quantization_config
        inner.is_quantized = base.quantization.bits < 16
        inner.requires_grad_(False)
        hold_narrow(base)
        for name, saved in files.items():
            load_adapter(base, saved, name, allow_other_base=True)
            if name in (dtypes := getattr(model, "dtypes_of_base", {})):
                _compute_in(dtypes[name], inner, name)
    inner._hf_peft_config_loaded = False
    activate(inner, active)
    return base


def _compute_in(dtype: torch.dtype, inner: PreTrainedModel, adapter: str) -> None:
    """Let an adapter be computed and saved in a dtype; PEFT has saved its masters in theirs."""
    said = next(name for name, known in DTYPES.items() if known is dtype)
    for layer in lora_layers(inner).values():
        if adapter in layer.lora_A:
            layer.adapter_dtypes[adapter] = dtype
            layer.configs[adapter] = replace(layer.configs[adapter], adapter_dtype=said)


def _checked(inner: nn.Module, folder: str, names: Sequence[str]) -> dict[str, AdapterFiles]:
    """The adapters that PEFT has saved in a folder, each as `load_adapter` will take it.

    Errors: `AdapterError`, `NumericError`; the model is as it was in any case.
    """
    files = {}
    layers = {at: one for at, one in inner.named_modules() if hasattr(one, "base_layer")}
    try:
        for at, layer in layers.items():
            inner.set_submodule(at, layer.base_layer)
        for name in names:
            try:
                check_name(name)
                # PEFT writes the adapter that is called `default` into the folder itself.
                saved = read_adapter(Path(folder) if name == ADAPTER else Path(folder, name))
                open_adapter(inner, saved, None).read()
            except (AdapterError, NumericError) as error:
                raise type(error)(
                    f"from_peft: adapter {name!r}: {error.problem}",
                    "delete_adapter it of the model, or train it again, as plain LoRA",
                ) from error
            files[name] = saved
    finally:
        for at, layer in layers.items():
            inner.set_submodule(at, layer)
    return files


def _say_quantized(base: Base, linears: BnbLinears) -> None:
    """transformers' own marks of a quantized model: its config, its quantizer, its flags."""
    model: Any = base.model
    said = quantization_config(base.quantization, base.dtype, linears.skipped)
    said.pop("quant_method", None)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig.from_dict(said))
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    quantizer.postprocess_model(model)
