"""A quantized linear to the tensors that bitsandbytes' checkpoints hold of it, and their settings.

They are what transformers saves of bitsandbytes' own layers, byte for byte; what reads them is in
`bnb_checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qlora_kit.base.bnb_checkpoint import expected_parts
from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.base.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlora_kit.base.quantize import Quantization, library_linear, state_tensors
from qlora_kit.base.resident import make_resident, streamed_of
from qlora_kit.device.target import device_type
from qlora_kit.errors import ResourceError

SIZES = {"U8": 1, "I8": 1, "F32": 4}
STATE_BYTES = 512
"""More than the JSON object of a 4-bit linear takes."""


def checkpoint_bytes(shape: torch.Size, quantization: Quantization) -> dict[str, int]:
    """The bytes of each tensor of a linear (out_features, in_features), at most, by its suffix."""
    return {
        suffix: SIZES[dtype] * (STATE_BYTES if count is None else count)
        for suffix, (dtype, count) in expected_parts(shape, quantization).items()
    }


def checkpoint_tensors(layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer on the CPU, by what follows its name; its bias is left out.

    `dtype` is what bitsandbytes' own forward dequantizes 4 bits to.
    """
    make_resident(layer)
    weight = layer.weight.detach()
    if isinstance(layer, Linear8bit):
        # 0: rows in their own order, the only layout that bitsandbytes (0.50) reads.
        layout = torch.zeros((), dtype=torch.uint8)
        made = {"weight": weight, "SCB": layer.row_absmax, "weight_format": layout}
    else:
        assert isinstance(layer, Linear4bit)
        shape = (layer.out_features, layer.in_features)
        nested = (layer.nested_absmax, layer.nested_map, layer.nested_offset)
        state = state_tensors(shape, dtype, layer.quant_type, layer.absmax, nested)
        made = {"weight": weight, **{f"weight.{name}": tensor for name, tensor in state.items()}}
    return {name: tensor.to("cpu") for name, tensor in made.items()}


def hold_as_theirs(model: nn.Module, dtype: torch.dtype) -> None:
    """Put bitsandbytes' own layers in place of ours, on the same tensors; they compute in `dtype`.

    No weight is copied. Errors: `ResourceError` for a shape that bitsandbytes would get wrong, and
    for what is streamed; nothing is changed then.
    """
    ours = {name: one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}
    for name, layer in ours.items():
        if streamed_of(layer) is not None:
            raise ResourceError(
                f"{name} is streamed, and what bitsandbytes' layers hold has to stay in its place",
                "load the base without --offload_base",
            )
        rows = isinstance(layer, Linear4bit) and layer.in_features % BLOCKSIZE
        if rows and device_type(layer.weight) == "cpu":
            raise ResourceError(
                f"{name} has {layer.in_features} inputs, no multiple of {BLOCKSIZE}: on CPUs with "
                "AVX512 bitsandbytes (0.50) computes such layers wrong without a word",
                "use --bits 8 or 16, or a GPU",
            )
    for name, layer in ours.items():
        said = checkpoint_tensors(layer, dtype)
        shape = (layer.out_features, layer.in_features)
        said = {key.removeprefix("weight."): one for key, one in said.items() if key != "weight"}
        theirs = library_linear(shape, layer.weight.data, dtype, said)
        theirs.bias = layer.bias
        theirs.train(layer.training)
        model.set_submodule(name, theirs)


def hold_as_ours(model: nn.Module) -> None:
    """Put our layers in place of bitsandbytes' own that transformers made, on the same tensors."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (layer := _ours(module)) is not None:
            layer.bias = module.bias
            model.set_submodule(name, layer)


def _ours(module: nn.Linear) -> QuantizedLinear | None:
    """Our layer of one of bitsandbytes', without its bias; None for any other linear."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    in_features, out_features = module.in_features, module.out_features
    if state is not None:
        nested: dict[str, Any] = {}
        if state.nested:
            nested = {"nested_absmax": state.state2.absmax, "nested_map": state.state2.code}
            nested["nested_offset"] = state.offset
        form = {"quant_type": state.quant_type, "absmax": state.absmax, **nested}
        return Linear4bit(in_features, out_features, weight.data, None, **form)
    # Its first forward moves the scales from the weight to a state of the layer.
    held = getattr(module, "state", None)
    scales = getattr(weight, "SCB", None)
    scales = getattr(held, "SCB", None) if scales is None else scales
    if scales is not None:
        return Linear8bit(in_features, out_features, weight.data, None, row_absmax=scales)
    return None


def quantization_config(
    quantization: Quantization,
    dtype: torch.dtype,
    skipped: Sequence[str],
    stored: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What config.json says of them; `skipped` are all other linears, the head among them.

    A list takes the place of what transformers leaves out by itself. `dtype` is what is multiplied
    in; `stored` is what the config.json of the same layers says beyond that.
    """
    ours = {"llm_int8_skip_modules": list(skipped)}
    if quantization.bits == 8:
        made = BitsAndBytesConfig(load_in_8bit=True, **ours)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
            **ours,
        )
        ours["bnb_4bit_compute_dtype"] = made.to_dict()["bnb_4bit_compute_dtype"]
    return {**made.to_dict(), **(stored or {}), **ours}
