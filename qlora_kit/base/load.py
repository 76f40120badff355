"""Files to a frozen model on the device: one tensor at a time is read, checked and quantized.

The architecture is built on the meta device and compared with the files' headers before any
weight is read. Then each tensor is read into one reused buffer, checked for non-finite values,
cast to the compute dtype, quantized on the device where it belongs to a decoder layer's linear,
and freed. Host memory stays at the result, one tensor and its buffer. Plain reads are used because
mapped files count as the process's own memory until they are unmapped.

Embeddings, norms and the output head are held in the compute dtype, never widened to fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.quantize import Quantization, quantize_linear
from qlora_kit.base.source import Source, fingerprint, resolve
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.base.validate import (
    TensorEntry,
    check_architecture,
    is_computed,
    read_config,
    read_entries,
)
from qlora_kit.config import BaseConfig
from qlora_kit.errors import ModelError, NumericError, ResourceError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter must know about the base it was trained on."""

    name: str
    revision: str | None
    fingerprint: str
    parameters: int
    bits: int
    quant_type: str | None
    double_quant: bool | None
    blocksize: int | None
    source_dtype: str
    compute_dtype: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_base(
    model: str = "tiny",
    *,
    bits: int = 4,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> tuple[Any, Any]:
    """A frozen base model and its tokenizer; the options are those of `BaseConfig`.

    The model is the transformers class of its architecture in evaluation mode, its decoder's
    linears quantized; `model.base_info` is a `BaseInfo`. Errors: `ConfigError`, `ModelError`,
    `TokenizerError`, `UnsafeInputError`, `NumericError`, `ResourceError`.
    """
    base = open_base(BaseConfig(model, revision, bits, quant_type, double_quant, dtype, device))
    return read_weights(base), base.tokenizer


@dataclass(frozen=True)
class OpenBase:
    """A base whose files were checked, before a byte of its weights is read.

    `model` has its architecture on the meta device, so that whatever depends on shapes alone
    (targets, rank, context, tokens) can be refused at once.
    """

    source: Source
    entries: Mapping[str, TensorEntry]
    model: Any
    tokenizer: Any
    quantization: Quantization
    dtype: torch.dtype
    device: torch.device

    @property
    def context(self) -> int:
        """The longest sequence that the model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)


def open_base(config: BaseConfig) -> OpenBase:
    """Find a base and check its config, headers and tokenizer. Errors as `load_base`."""
    device = find_device(config.device)
    source = resolve(config.model, config.revision)
    dtype = compute_dtype(config.dtype, device)
    quantization = Quantization(config.bits, config.quant_type, config.double_quant)
    read_config(source.directory)
    entries = read_entries(source.directory)
    model = build_on_meta(source.directory, dtype)
    check_architecture(entries, expected_shapes(model), _tied_names(model), source.directory)
    tokenizer = load_tokenizer(source.directory, model.get_input_embeddings().num_embeddings)
    _take_generation_config(model, source.directory)
    return OpenBase(source, entries, model, tokenizer, quantization, dtype, device)


def read_weights(base: OpenBase) -> Any:
    """The frozen model of an opened base on its device; `base.model` itself, filled, once."""
    model = base.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _fill(model, base.entries, base.quantization, base.dtype, base.device)
    _check_tied(model, base.entries, _tied_names(model), base.dtype)
    model.requires_grad_(False)
    model.eval()
    model.base_info = _info(base, parameters)
    model.base_directory = base.source.directory
    model.name_or_path = base.source.name
    return model


def find_device(name: str) -> torch.device:
    """The device of `--device`. Errors: `ResourceError` where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ResourceError(f"--device {name}: not a device", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"--device {name}: not supported", "use auto, cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"--device {name}: {count} CUDA devices here", "use --device cpu, or install CUDA"
        )
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype`; auto is bf16 where the device has it, else fp16 (GPU) or fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def build_on_meta(directory: Path, dtype: torch.dtype) -> Any:
    """The architecture of config.json with parameters that have a shape but no storage."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        # Buffers are real: rotary tables are computed when the modules are made.
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except Exception as error:
        # transformers raises what its own validation and arithmetic happen to raise.
        raise ModelError(
            f"{directory / 'config.json'}: describes no model that can be built: {error}",
            "correct the file",
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


def read_tensors(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on the CPU, in the files' order; each is valid until the next one is asked for.

    One buffer of the largest tensor's size is reused. Errors: `NumericError` with the tensor's
    name for a value that is not finite.
    """
    largest = max((entry.end - entry.start for entry in entries.values()), default=0)
    buffer = bytearray(largest)
    for entry in sorted(entries.values(), key=lambda entry: (str(entry.path), entry.start)):
        view = memoryview(buffer)[: entry.end - entry.start]
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            if _read_fully(file, view) != len(view):
                raise ModelError(f"{entry.path}: ended early", "fetch the file again")
        tensor = (
            torch.frombuffer(view, dtype=entry.torch_dtype).view(entry.shape)
            if len(view)
            else torch.empty(entry.shape, dtype=entry.torch_dtype)
        )
        check_finite(tensor, f"{entry.path}: {entry.name}")
        yield entry.name, tensor


def _read_fully(file: Any, view: memoryview) -> int:
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse a tensor with a NaN or an infinity. Errors: `NumericError` with their number."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The sum of absolute values is finite unless a value is not (or fp32 overflows: then count).
    if not torch.isfinite(tensor.abs().sum(dtype=torch.float32)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{name} holds {bad} values that are not finite", "fetch the file again"
            )


def _fill(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put every tensor in its place; a linear is quantized when its weight arrives."""
    linears = decoder_linears(model) if quantization.bits < 16 else {}
    for buffer_name, buffer in list(model.named_buffers()):
        parent, leaf = _parent(model, buffer_name)
        setattr(parent, leaf, buffer.to(device))
    wanted = {name: entry for name, entry in entries.items() if not is_computed(name)}
    for name, tensor in read_tensors(wanted):
        owner, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        moved = tensor.to(device=device, dtype=dtype, copy=True)
        if dtype is torch.float16 and tensor.dtype is not torch.float16:
            check_finite(moved, f"{name} in fp16")
        if leaf == "weight" and owner in linears:
            bias = linears[owner].bias
            layer = quantize_linear(moved, None, quantization, name=name)
            # A bias that was read before stays; one that comes later finds its place.
            layer.bias = bias
            parent, child = _parent(model, owner)
            setattr(parent, child, layer)
        else:
            parent, leaf = _parent(model, name)
            setattr(parent, leaf, nn.Parameter(moved, requires_grad=False))
    model.tie_weights()  # type: ignore[operator]


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _tied_names(model: Any) -> dict[str, str]:
    """Names of tensors that share another one's storage, to that other name."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def _check_tied(
    model: nn.Module,
    entries: Mapping[str, TensorEntry],
    tied: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """A checkpoint may hold a tied tensor a second time, if it is the same."""
    for name, shared in tied.items():
        if name not in entries:
            continue
        for _, tensor in read_tensors({name: entries[name]}):
            kept = model.get_parameter(shared)
            if not torch.equal(tensor.to(kept.device, dtype), kept):
                raise ModelError(
                    f"{entries[name].path}: {name} differs from {shared}, to which config.json "
                    "ties it",
                    "set tie_word_embeddings to false in config.json, or fetch the model again",
                )


def _info(base: OpenBase, parameters: int) -> BaseInfo:
    entries = base.entries.values()
    dtypes = {entry.torch_dtype for entry in entries if not is_computed(entry.name)}
    return BaseInfo(
        name=base.source.name,
        revision=base.source.revision,
        fingerprint=fingerprint(entries),
        parameters=parameters,
        bits=base.quantization.bits,
        quant_type=base.quantization.quant_type,
        double_quant=base.quantization.double_quant,
        blocksize=base.quantization.blocksize,
        source_dtype="+".join(sorted(dtype_name(found) for found in dtypes)),
        compute_dtype=dtype_name(base.dtype),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`; torch's own name for any other."""
    short = {value: key for key, value in DTYPES.items()}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def _take_generation_config(model: Any, directory: Path) -> None:
    if not (directory / "generation_config.json").exists():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(
            str(directory), local_files_only=True
        )
    except Exception as error:
        raise ModelError(
            f"{directory / 'generation_config.json'}: {error}", "correct or remove the file"
        ) from error
