"""What is exported, in which form, and how it is verified."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields

from qlora_kit.config.base import DTYPES
from qlora_kit.config.lora import OTHER_BASE_HELP
from qlora_kit.options.checks import a_name, also, between, one_of
from qlora_kit.options.option import Options, flag_of, option

LORA_FILE = "adapter.gguf"
"""An adapter as llama.cpp reads it, alone or beside its base; any other GGUF is a model."""
QUANTIZED = {"hf-4bit": 4, "hf-8bit": 8}
"""Formats whose linears bitsandbytes has quantized, and their bits."""
MERGED = ("hf", *QUANTIZED, "gguf")
"""Formats of a whole model, the adapter in its weights or beside it."""
FORMATS = (*MERGED, "gguf-lora", "adapter")
BLOCK_TYPES = ("q8_0", "q4_0")
"""Types of 8 and 4 bits in blocks of 32 numbers, which a GGUF alone has."""
LLAMA_TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"),
    *("Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
"""llama.cpp's types of files that it quantizes to without samples of text."""
GOES_WITH: dict[str, tuple[str, ...]] = {
    "merge_base": MERGED,
    "export_dtype": (*MERGED, "gguf-lora"),
    "quantize": ("gguf",),
    "with_towers": ("hf",),
    "shard_size": ("hf", *QUANTIZED),
    "verify": (*MERGED, "gguf-lora"),
    "max_kl": (*MERGED, "gguf-lora"),
    "compare": MERGED,
}
"""The formats that an option says something about; the others go with all."""
COMPARING = ("adapter", "allow_other_base", "verify", "compare")
"""The options that say something of a comparison alone."""


def _place() -> typing.Any:
    return option(
        None, "new or empty directory for the result", check=a_name(), path=True, metavar="DIR"
    )


def _overwrite() -> typing.Any:
    return option(False, "replace what is in --output_dir")


def _shard_size() -> typing.Any:
    return option(
        4 * 1024**3,
        "largest size of one file in bytes",
        check=between(4096, 1024**5),
        metavar="BYTES",
    )


def _verify(shown: str) -> typing.Any:
    return option(
        None,
        "file to verify on",
        shown_default=shown,
        check=a_name(),
        path=True,
        metavar="FILE",
    )


@dataclass(frozen=True)
class ExportConfig(Options):
    """What to export, in which form, and how it is verified."""

    title: typing.ClassVar[str] = "export"

    adapter: str | None = option(
        None, "directory of the adapter", check=a_name(), path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    output_dir: str | None = _place()
    overwrite: bool = _overwrite()
    format: str = option(
        "hf",
        "what to write: hf, a plain model; hf-4bit and hf-8bit, one that bitsandbytes has "
        "quantized; gguf, the file that llama.cpp and Ollama run; gguf-lora, the adapter as "
        "llama.cpp adds it to a GGUF of the base; adapter, the adapter alone, for others to use",
        check=one_of(*FORMATS),
    )
    base_name: str | None = option(
        None,
        "name of the base for those who get the result, such as its hub id: a path of this machine "
        "means nothing to them. Where the base lies in the result, beside the adapter, it is the "
        "name that the result will have",
        check=a_name(),
        metavar="OWNER/NAME",
        shown_default="the name that the adapter has; of a result with the base in it, "
        "--push_to_hub's",
    )
    merge_base: str = option(
        "auto",
        "add the update to the weights that training multiplied by (dequantized), to the original "
        "ones, or to none: then the base is written as it is, with the adapter beside it",
        check=one_of("auto", "none", "dequantized", "original"),
        shown_default="auto: none for hf-4bit and hf-8bit, else dequantized",
    )
    export_dtype: str = option(
        "auto",
        "dtype of the export; auto: the compute dtype of the run, f32 of gguf-lora; q8_0 and q4_0 "
        "with gguf",
        flag="dtype",
        check=one_of("auto", *DTYPES, *BLOCK_TYPES),
        reads=also({"f32": "fp32", "f16": "fp16"} | {name: name for name in BLOCK_TYPES}),
    )
    quantize: str | None = option(
        None,
        "a type that llama.cpp quantizes the GGUF to, from --dtype, where one is installed that "
        "does: Q4_K_M and others",
        check=one_of(*LLAMA_TYPES),
        reads=also({name.lower(): name for name in LLAMA_TYPES}),
    )
    with_towers: bool = option(
        False,
        "write the whole multimodal checkpoint, its towers byte for byte, not the text model alone",
    )
    shard_size: int = _shard_size()
    verify: str | None = _verify("the run's own held-out rows, else the sample")
    max_kl: float | None = option(
        None, "a larger divergence from the model as trained is an error", check=between(0, 1e6)
    )
    compare: bool = option(
        False,
        "also measure every other form that the model could leave in, one after the other; without "
        "--output_dir that is all, and nothing is left",
    )

    @property
    def merged_into(self) -> str:
        """The weights that the update is added to: `dequantized`, `original` or `none`."""
        if self.merge_base != "auto":
            return self.merge_base
        return "none" if self.format in (*QUANTIZED, "gguf-lora") else "dequantized"

    @property
    def is_beside(self) -> bool:
        """Whether the export holds the base as it was trained on, and PEFT's files beside it."""
        return self.merged_into == "none" and self.format in ("hf", *QUANTIZED)

    @property
    def has_lora_beside(self) -> bool:
        """Whether the export is a GGUF of the base, and one of the adapter beside it."""
        return self.merged_into == "none" and self.format == "gguf"

    @property
    def closer(self) -> str:
        """What would bring the export nearer to the model as trained: the remedy of an error."""
        if self.format == "gguf-lora":
            return "export with --dtype f32"
        if self.format in QUANTIZED:
            unmerged = self.merged_into == "none"
            how = "in the bits of the training run" if unmerged else "with --merge_base none"
            return f"export {how}, which quantizes nothing again"
        if self.merged_into == "original":
            return "export with --merge_base dequantized"
        if self.quantize is not None:
            return "export with a larger type of --quantize"
        return "export with a wider --dtype"

    def _conflicts(self) -> typing.Iterator[str]:
        for field in fields(self):
            formats = GOES_WITH.get(field.name, FORMATS)
            value = getattr(self, field.name)
            if value in BLOCK_TYPES:
                formats = ("gguf",)
            if self.format not in formats and value != field.default:
                name = flag_of(field).lstrip("-")
                yield f"{name} {value} goes with format {' or '.join(formats)}, not {self.format}"
            comparing = self.compare and self.output_dir is None
            if comparing and field.name not in COMPARING and value != field.default:
                why = "--compare alone measures every form, and writes none"
                yield f"--{flag_of(field)} is given, and no --output_dir: {why}"
        if self.quantize is not None and self.export_dtype in BLOCK_TYPES:
            yield f"quantize {self.quantize} goes with a dtype of 16 or 32 bits"
        if self.with_towers and self.merged_into == "none":
            yield "with_towers goes with a merge, not with merge_base none"


@dataclass(frozen=True)
class QuantizeConfig(Options):
    """Where a base goes that is quantized without any adapter."""

    title: typing.ClassVar[str] = "the checkpoint"

    output_dir: str | None = _place()
    overwrite: bool = _overwrite()
    shard_size: int = _shard_size()
    verify: str | None = _verify("the sample")

    def as_export(self, bits: int) -> ExportConfig:
        """The export that it is, of a base alone."""
        (format,) = (name for name, held in QUANTIZED.items() if held == bits)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ExportConfig(format=format, **given)
