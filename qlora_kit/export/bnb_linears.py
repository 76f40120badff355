"""Which linears of an export bitsandbytes has quantized, and the tensors of each.

A linear that is in the export what it was in training keeps its bytes, those of the files where
they are quantized already. The others are quantized from their numbers in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.bnb_tensors import checkpoint_tensors
from qlora_kit.base.form import in_bits
from qlora_kit.base.linear import QuantizedLinear, quantize_linear
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.skipped import left_linears
from qlora_kit.base.tensors import as_stored, check_finite
from qlora_kit.export.tensors import ExportTensor
from qlora_kit.lora.inject import lora_layers


@dataclass(frozen=True)
class BnbLinears:
    """How the linears of an export are quantized: those `named`, not those `skipped` nor the head.

    `skipped` are all linears that are not, the head among them, as config.json lists them.
    """

    quantization: Quantization
    named: frozenset[str]
    skipped: tuple[str, ...]

    @staticmethod
    def of(base: Base, bits: int) -> BnbLinears:
        """Those of `base` in an export of `bits`, its weights read or not.

        In the run's own bits they are as in the run; in others nf4 with double quant.
        """
        held, model = base.quantization, base.model
        adapted = lora_layers(model)
        inside = tuple(f"{name}." for name in adapted)
        every: dict[str, nn.Linear] = {name: one.base_layer for name, one in adapted.items()}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not (inside and name.startswith(inside)):
                every[name] = module
        inner = adapted.keys() | decoder_linears(model).keys()
        linears = {name: linear for name, linear in every.items() if name in inner}
        left = base.form.skipped
        if held.bits != bits:
            held = in_bits(held, bits)
            left |= left_linears(held, linears, model)[0]
        named = frozenset(linears.keys() - left)
        return BnbLinears(held, named, tuple(sorted(every.keys() - named)))

    def tensors(
        self,
        base: Base,
        tensor: ExportTensor,
        dtype: torch.dtype,
        *,
        unchanged: bool,
        beside_changed: bool = False,
    ) -> dict[str, Tensor]:
        """The tensors of a linear by their names in the files; `tensor` is its weight.

        `unchanged`: it is what training multiplied by. `beside_changed`: others are not, and what
        all say of themselves is one `dtype`. Errors: `NumericError`.
        """
        name, owner = tensor.linear, tensor.name.removesuffix("weight")
        assert name is not None
        stored = base.form.stored.get(name)
        if unchanged and self.quantization.bits == base.quantization.bits:
            if stored is not None and not beside_changed:
                made = {suffix: as_stored(entry) for suffix, entry in stored.entries.items()}
            else:
                module = base.model.get_submodule(name)
                layer = getattr(module, "base_layer", module)
                assert isinstance(layer, QuantizedLinear)
                made = checkpoint_tensors(layer, dtype)
        else:
            weight = tensor.make()
            check_finite(weight, f"{tensor.name} of the export", "export with --merge_base none")
            layer = quantize_linear(weight, None, self.quantization, name=tensor.name)
            made = checkpoint_tensors(layer, dtype)
        return {f"{owner}{suffix}": one for suffix, one in made.items()}
