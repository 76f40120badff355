"""What a config.json says of weights that are stored as 8-bit floats, and what is not read at all.

A weight of 8-bit floats has scales beside it: one for the tensor, one a row, or one a block. Four
tools write such files, each with words of its own: `fp8` (DeepSeek's, Qwen's and Mistral's models,
and AutoFP8), `fbgemm_fp8` (Meta's), `compressed-tensors` (float-quantized) and `modelopt` (FP8).
Whatever is packed (int4, nvfp4, mxfp4, GPTQ, AWQ), sparse or rotated is refused by name.

Sources: transformers' `FineGrainedFP8Config` and compressed-tensors' `QuantizationConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError

BITSANDBYTES = "bitsandbytes"
FP8 = "fp8"
DEFAULT_BLOCK = (128, 128)
"""Of `fp8` where config.json does not say (transformers)."""
LARGEST_BLOCK = 2**16
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
"""Names of what a weight is multiplied by; the first one's `inv` means just that."""
REMEDY = (
    "give the original 16-bit model (--bits quantizes it), one in 8-bit floats, or one that "
    "bitsandbytes quantized"
)


@dataclass(frozen=True)
class Blocks:
    """Parts of a matrix that share a scale, in rows and columns; None stands for all of them."""

    rows: int | None
    columns: int | None

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix of `shape` (out, in) has in each direction."""
        rows, columns = shape
        return (
            1 if self.rows is None else math.ceil(rows / self.rows),
            1 if self.columns is None else math.ceil(columns / self.columns),
        )


TENSOR, ROWS = Blocks(None, None), Blocks(1, None)


@dataclass(frozen=True)
class Fp8Scheme:
    """The scales that a checkpoint may have, by name; `skipped` says which modules have none."""

    blocks: Mapping[str, tuple[Blocks, ...]]
    skipped: tuple[str, ...] = ()


def check_stored(config: Mapping[str, Any], path: Path) -> None:
    """Refuse weights in a form that is not read. Errors: `ModelError` naming what `path` says."""
    stored = config.get("quantization_config")
    if stored and (not isinstance(stored, dict) or _method(stored) != BITSANDBYTES):
        fp8_scheme(config, path)


def fp8_scheme(config: Mapping[str, Any], path: Path) -> Fp8Scheme | None:
    """How the 8-bit floats of a checkpoint are scaled, None where config.json says nothing of them.

    Errors: `ModelError` where it says anything else than bitsandbytes, or what is not read.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise _refused(path, f"by {str(stored)[:60]!r}")
    method = _method(stored)
    if method == BITSANDBYTES:
        return None
    known = {
        FP8: _fp8,
        "fbgemm_fp8": _fbgemm,
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
    }
    if not isinstance(method, str) or method not in known:
        raise _refused(path, f"by {str(method)[:60]!r}")
    try:
        blocks = known[method](stored)
    except ValueError as error:
        raise _refused(path, f"by {method!r} with {error}") from error
    return Fp8Scheme(blocks, tuple(_names(stored)))


def _method(stored: Mapping[str, Any]) -> Any:
    return stored.get("quant_method", BITSANDBYTES)


def _refused(path: Path, how: str) -> ModelError:
    return ModelError(f"{path}: the weights are quantized {how}, which is not supported", REMEDY)


def _fp8(stored: Mapping[str, Any]) -> dict[str, tuple[Blocks, ...]]:
    """`weight_block_size` null is one scale a tensor; AutoFP8 leaves it out and means that."""
    if stored.get("expert_dtype", FP8) != FP8:
        raise ValueError(f"expert_dtype {str(stored['expert_dtype'])[:60]!r}")
    if stored.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"fmt {str(stored['fmt'])[:60]!r}")
    said = stored.get("weight_block_size", DEFAULT_BLOCK)
    inverse = TENSOR if said is None else _block(said)
    plain = TENSOR if "weight_block_size" not in stored else inverse
    return {"weight_scale_inv": (inverse,), "weight_scale": (plain,), "qscale_weight": (inverse,)}


def _fbgemm(_: Mapping[str, Any]) -> dict[str, tuple[Blocks, ...]]:
    return {"weight_scale": (ROWS,)}


def _compressed_tensors(stored: Mapping[str, Any]) -> dict[str, tuple[Blocks, ...]]:
    sparse = stored.get("sparsity_config")
    if sparse and (not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense"):
        raise ValueError("sparsity_config")
    rotated = stored.get("transform_config")
    if rotated and (not isinstance(rotated, dict) or rotated.get("config_groups", True)):
        raise ValueError("transform_config")
    found = []
    for name, group in _groups(stored):
        form = group.get("format") or stored.get("format") or "float-quantized"
        if form not in ("float-quantized", "naive-quantized"):
            raise ValueError(f"format {str(form)[:60]!r}")
        found.append(_blocks_of(name, group))
    if not found:
        raise ValueError("no group of weights")
    return {"weight_scale": tuple(found)}


def _modelopt(stored: Mapping[str, Any]) -> dict[str, tuple[Blocks, ...]]:
    if stored.get("quant_algo", "FP8") != "FP8":
        raise ValueError(f"quant_algo {str(stored['quant_algo'])[:60]!r}")
    found = tuple(_blocks_of(name, group) for name, group in _groups(stored))
    return {"weight_scale": found or (TENSOR,)}


def _groups(stored: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The groups that quantize weights."""
    groups = stored.get("config_groups", {})
    if not isinstance(groups, dict):
        raise ValueError("config_groups that are no object")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ValueError(f"a config_groups.{str(name)[:60]} that is no object")
        if group.get("weights") is not None:
            yield str(name)[:60], group


def _blocks_of(name: str, group: Mapping[str, Any]) -> Blocks:
    """The blocks of a group of compressed-tensors."""
    weights = group["weights"]
    if not isinstance(weights, dict):
        raise ValueError(f"weights of {name} that are no object")
    bits, kind = weights.get("num_bits"), weights.get("type")
    if (bits, kind) != (8, "float"):
        raise ValueError(f"weights of {name} in {str(bits)[:20]} bits of {str(kind)[:20]!r}")
    if weights.get("symmetric", True) is not True or weights.get("dynamic", False) is not False:
        raise ValueError(f"weights of {name} that are not symmetric, or dynamic")
    strategy = weights.get("strategy", "tensor")
    if strategy == "block":
        return _block(weights.get("block_structure"))
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"weights of {name} by {str(strategy)[:60]!r}")
    return TENSOR if strategy == "tensor" else ROWS


def _block(said: object) -> Blocks:
    if (
        not isinstance(said, (list, tuple))
        or len(said) != 2
        or not all(type(size) is int and 0 < size <= LARGEST_BLOCK for size in said)
    ):
        raise ValueError(f"blocks of {str(said)[:60]}")
    return Blocks(*said)


def _names(stored: Mapping[str, Any]) -> Iterator[str]:
    """The modules that are said to be left as they are."""
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
        said = stored.get(key)
        if isinstance(said, list):
            yield from (name for name in said if isinstance(name, str))
