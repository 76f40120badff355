"""Dequantize, add, round once: the tensors of a plain model with an adapter in it, one by one.

The update is added in fp32 to the base weight as training multiplied by it: in 4 bits dequantized
in the run's compute dtype, in 8 bits not rounded at all. A writer rounds the sum once, to the dtype
of what it writes. Merging into the original weights is offered; it is another model, and `verify`
says how far it is from what was trained. Every writer reads this list; a tensor is made when it is
asked for, so that host memory holds as many as the writer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.meta_model import tied_names
from qlora_kit.base.recurrence import recurrent_parameters
from qlora_kit.config.export import ExportConfig
from qlora_kit.device.target import dtype_name
from qlora_kit.errors import ConfigError
from qlora_kit.export.head import head_weight, original_weight
from qlora_kit.lora.inject import ADAPTER, lora_layers
from qlora_kit.lora.layer import LoRALinear, Masters
from qlora_kit.lora.merged import merged_weight, multiplied_dtype


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of the exported model: its shape, and how to make it.

    `kept` is the dtype of one that is taken over as it is; None where the export's is taken.
    `linear` is the name of the linear, no head, whose weight it is; None for any other tensor.
    """

    name: str
    shape: torch.Size
    make: Callable[[], Tensor]
    kept: torch.dtype | None = None
    linear: str | None = None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Its bytes in an export of `dtype`."""
        return self.shape.numel() * (self.kept or dtype).itemsize


def name_of(base: Base, options: ExportConfig) -> tuple[str, bool]:
    """What an export calls its base, and whether others find it on the hub by that name.

    With PEFT's files beside it `--base_name` is the name of the export itself.
    """
    if options.base_name is not None and not options.is_beside:
        return options.base_name, True
    return base.source.name, base.source.revision is not None


def dtype_of(base: Base, options: ExportConfig) -> str:
    """The short name of the dtype that is written; auto is the compute dtype of the run.

    Of an adapter for llama.cpp it is fp32, which holds what was trained and is small all the same.
    """
    if options.export_dtype != "auto":
        return options.export_dtype
    return "fp32" if options.format == "gguf-lora" else dtype_name(base.dtype)


def check_merge_base(base: Base, merge_base: str) -> None:
    """Refuse to merge into original weights that no file holds. Errors: `ConfigError`."""
    if merge_base == "original" and base.form.stored:
        raise ConfigError(
            f"--merge_base original: the base holds {next(iter(base.form.stored))}.weight in "
            "quantized form only",
            "use --merge_base dequantized",
        )


def export_tensors(
    base: Base,
    adapter: str | None = ADAPTER,
    merge_base: str = "dequantized",
    *,
    untied: bool = False,
) -> list[ExportTensor]:
    """`model_tensors` by the names that a checkpoint of the model has."""
    tensors = model_tensors(base, adapter, merge_base, untied=untied)
    return tensors if base.wrapper is not None else named_as_in_files(tensors, base)


def model_tensors(
    base: Base,
    adapter: str | None = ADAPTER,
    merge_base: str = "dequantized",
    *,
    untied: bool = False,
) -> list[ExportTensor]:
    """Every tensor of the plain model in its order; each is made when it is asked for.

    `merge_base`: `dequantized` adds to the weights that training multiplied by, `original` to the
    checkpoint's own, 8-bit floats as the numbers that they mean. With `none` they are those that
    training multiplied by, and the adapter is left out. A head that shares the embedding's weight
    in the files is written where it is `untied`.
    Errors: `ConfigError` for the original weights of a checkpoint that holds quantized ones only.
    """
    check_merge_base(base, merge_base)
    model = base.model
    multiplied = multiplied_dtype(base)

    def frozen(name: str, linear: nn.Linear) -> Tensor:
        if merge_base != "original":
            return dequantize(linear, multiplied)
        return original_weight(base, f"{name}.weight")

    def merged(name: str, layer: LoRALinear) -> Tensor:
        weight = frozen(name, layer.base_layer)
        if merge_base == "none" or adapter is None:
            return weight
        return merged_weight(weight, Masters(adapter).part(layer))

    tensors: list[ExportTensor] = []
    adapted, tied, recurrent = lora_layers(model), tied_names(model), recurrent_parameters(model)
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        linear = adapted[name].base_layer if name in adapted else module
        made = _written(linear)
        if isinstance(linear, nn.Linear) and module is not model.get_output_embeddings():
            shape = torch.Size((linear.out_features, linear.in_features))
            layer = adapted.get(name)
            make = partial(frozen, name, linear) if layer is None else partial(merged, name, layer)
            tensors.append(ExportTensor(f"{name}.weight", shape, make, linear=name))
            made.pop("weight")
        if module is model.get_output_embeddings() and isinstance(module, QuantizedLinear):
            made.pop("weight")
            if untied or not base.is_tied:
                shape = torch.Size((module.out_features, module.in_features))
                make = partial(head_weight, base, name, merge_base)
                tensors.append(ExportTensor(f"{name}.weight", shape, make))
        for leaf, parameter in made.items():
            full = f"{name}.{leaf}"
            if full in tied:
                continue  # the tensor that it shares is written, and config.json says tied
            # What a recurrence is held in fp32 for is written so.
            own = full in recurrent and parameter.dtype is torch.float32
            kept = parameter.dtype if own else None
            tensors.append(ExportTensor(full, parameter.shape, parameter.detach, kept))
    return tensors


def named_as_in_files(tensors: Sequence[ExportTensor], base: Base) -> list[ExportTensor]:
    """The same by the names of the base's files, which may differ from the model's."""
    names = {name: entry.name for name, entry in base.entries.items()}
    return [replace(one, name=names.get(one.name, one.name)) for one in tensors]


def _written(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by itself that a checkpoint has: parameters, and lasting buffers."""
    if isinstance(module, nn.Linear):
        return dict(module.named_parameters(recurse=False))
    made: dict[str, Tensor] = {}
    module._save_to_state_dict(made, "", keep_vars=True)  # type: ignore[no-untyped-call]
    return made
