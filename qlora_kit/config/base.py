"""The base model: which one, and how it is held."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from typing import Any

from qlora_kit.options.checks import a_name, listed_names, one_of
from qlora_kit.options.option import Options, option

QUANT_TYPES = ("nf4", "fp4")
DTYPES = ("bf16", "fp16", "fp32")
DEFAULT_BITS = 4


def _device(value: str) -> str | None:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
        return None
    other = re.match(r"(xpu|mps|hpu|npu|tpu|xla|hip|rocm|vulkan|privateuseone)\b", value)
    names = "auto, cpu, cuda or cuda:N"
    return f"{names} (AMD's cards are cuda; no other accelerator is supported)" if other else names


def _names(value: Any) -> Any:
    """Names, however they are separated, in one order; a regex as it is."""
    if isinstance(value, str):
        value = value if (listed := listed_names(value)) is None else listed
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(sorted({one for one in value if one}))
    return value


@dataclass(frozen=True)
class BaseConfig(Options):
    """Which base model, and how it is held."""

    title: typing.ClassVar[str] = "model"

    model: str = option(
        "tiny",
        "local directory, hub id or short name (tiny ships with the package; llama-7b, "
        "llama3.1-8b, mistral-7b, ... stand for hub ids)",
        aliases=("model_name_or_path",),
        check=a_name(),
        path=True,
        metavar="NAME|DIR",
    )
    revision: str | None = option(
        None,
        "hub revision: branch, tag or commit",
        check=a_name("a branch, tag or commit"),
        metavar="REV",
    )
    bits: int | None = option(
        None,
        "bits of the base's linear layers; 16: not quantized",
        check=one_of(4, 8, 16),
        shown_default=f"{DEFAULT_BITS}, or what the base is already quantized in",
    )
    quant_type: str | None = option(
        None, "4-bit format", check=one_of(*QUANT_TYPES), shown_default="nf4"
    )
    double_quant: bool | None = option(
        None, "quantize the 4-bit scales as well", shown_default="on"
    )
    head_bits: int = option(
        16,
        "bits of the output head; 8 or 4: quantized too, decoded part by part, other numbers than "
        "in 16",
        check=one_of(4, 8, 16),
    )
    dtype: str = option(
        "auto",
        "compute dtype; auto: bf16 where the device has it, else fp16 (GPU) or fp32; fp32 on a CPU "
        "leaves matrices that the files have in 16 bits so",
        check=one_of("auto", *DTYPES),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", check=_device)
    resize_embeddings: bool = option(
        False,
        "where the tokenizer has more tokens than the embedding has rows, add rows: each the mean "
        "of the others, and frozen like them",
    )
    skip_modules: str | tuple[str, ...] | None = option(
        None,
        "linears that are not quantized, beside the head: comma-separated names (of linears, or of "
        "modules that hold them), or a regex; `plan --quantization_error` shows the worst",
        reads=_names,
        check=lambda value: None if value and all(value) else "names or a regex",
        metavar="NAMES",
        shown_default="none",
    )
    base_cache: bool = option(
        True,
        "keep the quantized base on disk ($QLORA_KIT_CACHE, else ~/.cache/qlora_kit/bases) and "
        "start from it the next time; `qlora-kit cache` lists and clears",
    )

    chosen: typing.ClassVar[frozenset[str]] = frozenset()
    """Of `bits`, `quant_type` and `double_quant` those that were given and not left alone."""

    def _conflicts(self) -> typing.Iterator[str]:
        names = ("bits", "quant_type", "double_quant")
        given = frozenset(name for name in names if getattr(self, name) is not None)
        object.__setattr__(self, "chosen", given)
        object.__setattr__(self, "bits", self.bits or DEFAULT_BITS)
        if self.bits == 4:
            object.__setattr__(self, "quant_type", self.quant_type or QUANT_TYPES[0])
            object.__setattr__(self, "double_quant", self.double_quant is not False)
            return
        if self.bits == 16 and self.skip_modules is not None:
            yield "skip_modules goes with bits 4 or 8: in 16 bits nothing is quantized"
        if self.bits == 16 != self.head_bits:
            yield (
                f"head_bits {self.head_bits} goes with bits 4 or 8: in 16 bits nothing is quantized"
            )
        for name in ("quant_type", "double_quant"):
            if getattr(self, name) is not None:
                yield (
                    f"{name} {getattr(self, name)} goes with bits 4 (nf4 or fp4, double_quant on "
                    f"or off), not with bits {self.bits}"
                )
