"""One adapter merged into copies of the linears that it adapts: for serving that adapter alone.

The copies lie beside the base, in 16 bits or quantized anew, and are what takes part while the
model's one reference names them: no base weight is written, another adapter or the base is a switch
away, and with the last reference to them their memory is free again. A step then has no low-rank
matmuls, and with a copy in 16 bits no weight is dequantized.

The update is added in fp32 to the base weight as training multiplied by it: in 4 bits dequantized
in the run's compute dtype, in 8 bits not rounded at all. The sum is rounded once: to the compute
dtype, or by quantizing it. Exports merge by the same rule (`export/tensors.py`). In 16 bits that is
as far from the adapter beside its base as rounding is; quantized anew it is another model, so that
who makes one should say how far it is.

Left out: several adapters in one copy (a weighted sum is an adapter of its own, `bank.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.base.form import in_bits
from qlora_kit.base.linear import QuantizedLinear, dequantize, quantize_linear
from qlora_kit.base.tagged import quantized_tensors
from qlora_kit.base.tensors import check_finite
from qlora_kit.device.found import empty_cache, free_bytes
from qlora_kit.errors import ConfigError, ResourceError
from qlora_kit.lora.inject import lora_layers
from qlora_kit.lora.low_rank import Part, delta_weight
from qlora_kit.lora.switch import Active, Adapted
from qlora_kit.options.checks import size_text

TRANSIENT = 12
"""Bytes of an entry while its linear is merged: the base weight as it was multiplied by, in fp32,
the update in fp32, and the rounded sum."""


class Merged(Adapted):
    """A merged copy of each adapted linear, with nothing beside it; the rest is the base."""

    @property
    def nbytes(self) -> int:
        """What the copies take; biases are the base's own."""
        return sum(_bytes_of(part.base) for part in self.parts.values())


def merge(base: Base, adapter: Active, bits: int | None = None) -> Merged:
    """Copies of the linears that `adapter` adapts, merged, in `bits`; None: as the base's are.

    Linears that the base holds in 16 bits are copied in 16. Nothing of the base is written, and
    nothing takes part in the model until the result is made its active one.
    Errors: `ConfigError` for bits that a base has not, `ResourceError` where the copies do not fit,
    `NumericError` for a sum that is not finite or that a format cannot hold.
    """
    bits = base.quantization.bits if bits is None else bits
    check_bits(base, bits)
    layers = lora_layers(base.model).values()
    parts: dict[nn.Module, Part] = {one: part for one in layers if (part := adapter.part(one))}
    _check_room(base, parts, bits)
    return Merged(
        adapter.name,
        {layer: Part(_merged(base, adapter.name, part, bits)) for layer, part in parts.items()},
    )


def check_bits(base: Base, bits: int) -> None:
    """Refuse bits that no copy beside a base is made in. Errors: `ConfigError`."""
    if bits not in (4, 8, 16):
        raise ConfigError(
            f"an adapter is merged in 4, 8 or 16 bits, got {bits}", "give one of them"
        )
    if base.quantization.bits == 16 != bits:
        raise ConfigError(
            f"an adapter would be merged in {bits} bits, and the base is held in 16",
            "merge it in 16 bits",
        )


def multiplied_dtype(base: Base) -> torch.dtype:
    """What a base weight is dequantized in, so that it is the one that training multiplied by."""
    # In 8 bits training multiplies by whole numbers and scales the products.
    return torch.float32 if base.quantization.bits == 8 else base.dtype


def merged_weight(weight: Tensor, part: Part | None) -> Tensor:
    """A base weight (out_features, in_features) with an update, in fp32; itself without one.

    It is changed where it is in fp32.
    """
    if part is None:
        return weight
    return weight.float().add_(delta_weight(part).to(weight.device))


@torch.no_grad()
def _merged(base: Base, name: str, part: Part, bits: int) -> nn.Linear:
    """A frozen copy of a linear with the update in it."""
    linear = part.base
    weight = merged_weight(dequantize(linear, multiplied_dtype(base)), part)
    said = f"a weight with adapter {name!r} merged into it"
    if bits < 16 and isinstance(linear, QuantizedLinear):
        check_finite(weight, said, "train the adapter again")
        return quantize_linear(weight, linear.bias, in_bits(base.quantization, bits), name=said)
    rounded = weight.to(base.dtype)
    check_finite(rounded, f"{said} in {base.dtype}", "train the adapter again, or use --dtype bf16")
    # Without storage: the weight that it begins with would be thrown away.
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(rounded, requires_grad=False)
    copy.bias = linear.bias
    return copy


def _check_room(base: Base, parts: Mapping[nn.Module, Part], bits: int) -> None:
    """Refuse copies that are larger than what is free. Errors: `ResourceError`."""
    sizes = {layer: part.base.in_features * part.base.out_features for layer, part in parts.items()}
    needed = TRANSIENT * max(sizes.values(), default=0)
    for layer, part in parts.items():
        kept = bits if isinstance(part.base, QuantizedLinear) else 16
        needed += sizes[layer] * base.dtype.itemsize if kept == 16 else sizes[layer] * kept // 8
        # Scales: of blocks in 4 bits, of rows in 8.
        scales = {4: -(-sizes[layer] // BLOCKSIZE), 8: part.base.out_features}.get(kept, 0)
        needed += 4 * scales
    empty_cache()
    free = free_bytes(base.device)
    if needed > free:
        raise ResourceError(
            f"an adapter merged in {bits} bits takes {size_text(needed)} beside the base, and "
            f"{size_text(free)} are free",
            "merge it in 4 or 8 bits, or leave it unmerged" if bits == 16 else "leave it unmerged",
        )


def _bytes_of(linear: nn.Linear) -> int:
    return sum(tensor.nbytes for tensor in quantized_tensors(linear) or [linear.weight])
