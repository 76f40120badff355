"""Checkpoints that bitsandbytes has quantized already: their keys, checked, become our layers.

In 4 bits a linear is stored as `weight` (packed bytes), `weight.absmax`, `weight.quant_map`, with
double quant also `weight.nested_absmax` and `weight.nested_quant_map`, and a JSON object of the
rest as bytes, `weight.quant_state.bitsandbytes__nf4`. In 8 bits it is `weight`, `SCB` (one scale a
row) and `weight_format`. bitsandbytes reads beyond the end of a state that is too short, so counts,
maps and JSON are all compared with the architecture before it sees any of them.

Linears that the checkpoint leaves in 16 bits stay so. Left out: storage dtypes other than uint8,
and blocks of other sizes than bitsandbytes' defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.encode_weight import BLOCKSIZE
from qlora_kit.base.fp8_scheme import BITSANDBYTES
from qlora_kit.base.json_file import is_deep
from qlora_kit.base.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlora_kit.base.quantize import (
    NESTED_BLOCKSIZE,
    Quantization,
    code_tables,
    dynamic_map,
)
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.config.base import DEFAULT_BITS, QUANT_TYPES, BaseConfig
from qlora_kit.errors import ConfigError, ModelError

STATE = "weight.quant_state.bitsandbytes__"
PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SUFFIXES = (
    *(f"weight.{part}" for part in PARTS_4BIT),
    *(STATE + quant_type for quant_type in QUANT_TYPES),
    "SCB",
    "weight_format",
)
STATE_LIMIT = 4096
LARGEST_OFFSET = 1e38  # it is an fp32 number
STATE_DTYPES = ("float16", "bfloat16", "float32")
MAP_TOLERANCE = 1e-6  # bitsandbytes has computed its tables in more than one way


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear of a checkpoint: its tensors by suffix (`weight`, `weight.absmax` ...).

    `nested_offset` is what double quant took from the scales; 0 without it.
    """

    entries: Mapping[str, TensorEntry]
    nested_offset: float = 0.0


def stored_quantization(config: Mapping[str, Any], path: Path) -> Quantization | None:
    """How config.json (at `path`) says that bitsandbytes has quantized; None where it has not.

    `config` has passed `check_family`. Errors: `ModelError` naming a setting.
    """
    stored = config.get("quantization_config")
    if not stored or stored.get("quant_method", BITSANDBYTES) != BITSANDBYTES:
        return None
    four, eight = stored.get("load_in_4bit") is True, stored.get("load_in_8bit") is True
    if four == eight:
        raise ModelError(
            f"{path}: quantization_config asks for neither 4 nor 8 bits, or for both",
            "set one of load_in_4bit and load_in_8bit",
        )
    if eight:
        return Quantization(8)
    quant_type = stored.get("bnb_4bit_quant_type", "fp4")
    storage = stored.get("bnb_4bit_quant_storage", "uint8")
    if quant_type not in QUANT_TYPES or storage != "uint8":
        raise ModelError(
            f"{path}: bnb_4bit_quant_type {quant_type!r} in storage {storage!r} is not supported",
            "nf4 and fp4 in uint8 are; give the original 16-bit model",
        )
    return Quantization(4, quant_type, bool(stored.get("bnb_4bit_use_double_quant")))


def agree(config: BaseConfig, stored: Quantization | None, path: Path) -> Quantization:
    """What holds for a run: what the checkpoint has, if it has any; else what `config` says.

    Errors: `ConfigError` where an option that was given contradicts the checkpoint.
    """
    bits, head_bits = config.bits or DEFAULT_BITS, config.head_bits
    asked = Quantization(
        bits, config.quant_type, config.double_quant, config.skip_modules, head_bits
    )
    for option in sorted(config.chosen) if stored is not None else ():
        mine, theirs = getattr(asked, option), getattr(stored, option)
        if mine != theirs:
            raise ConfigError(
                f"--{option} {mine} contradicts {path}: its weights are already quantized, with "
                f"{option} {theirs}",
                f"leave --{option} out, or give the original 16-bit model",
            )
    return asked if stored is None else replace(stored, head_bits=head_bits)


def split_stored(
    entries: Mapping[str, TensorEntry],
    linears: Mapping[str, nn.Linear],
    stored: Quantization,
    where: Path,
) -> tuple[dict[str, StoredLinear], dict[str, TensorEntry]]:
    """The quantized linears of a checkpoint by name, checked, and the ordinary tensors.

    `linears` are the architecture's. Only headers and the small JSON states are read.
    Errors: `ModelError` naming the tensor and what was expected.
    """
    groups: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        for suffix in SUFFIXES:
            name = key.removesuffix(f".{suffix}")
            if name != key and name in linears:
                groups.setdefault(name, {})[suffix] = entry
    if not groups:
        raise ModelError(
            f"{where}: config.json says {stored.bits} bits, and no tensor is quantized",
            "fetch the model again, or remove quantization_config from config.json",
        )
    layers, dtypes = {}, set()
    for name, group in groups.items():
        if f"{name}.weight" not in entries:
            raise ModelError(f"{where}: lacks {name}.weight", "fetch the model again")
        group["weight"] = entries[f"{name}.weight"]
        shape = torch.Size((linears[name].out_features, linears[name].in_features))
        _check_group(name, group, expected_parts(shape, stored))
        offset = 0.0
        if stored.bits == 4:
            state = _read_state(name, group[STATE + str(stored.quant_type)], shape, stored)
            dtypes.add(state["dtype"])
            offset = float(state.get("nested_offset", 0.0)) if stored.double_quant else 0.0
        layers[name] = StoredLinear(group, offset)
    if len(dtypes) > 1:
        raise ModelError(
            f"{where}: layers were quantized from different dtypes ({', '.join(sorted(dtypes))})",
            "fetch the model again",
        )
    taken = {f"{name}.{suffix}" for name, group in groups.items() for suffix in group}
    return layers, {key: entry for key, entry in entries.items() if key not in taken}


def expected_parts(shape: torch.Size, stored: Quantization) -> dict[str, tuple[str, int | None]]:
    """Suffix to dtype and number of elements; None where any number up to a limit may be."""
    if stored.bits == 8:
        parts = {"weight": ("I8", shape.numel()), "SCB": ("F32", shape[0])}
        return {**parts, "weight_format": ("U8", 1)}
    blocks = math.ceil(shape.numel() / BLOCKSIZE)
    expected: dict[str, tuple[str, int | None]] = {
        "weight": ("U8", math.ceil(shape.numel() / 2)),
        "weight.absmax": ("U8" if stored.double_quant else "F32", blocks),
        "weight.quant_map": ("F32", 16),
        STATE + str(stored.quant_type): ("U8", None),
    }
    if stored.double_quant:
        expected["weight.nested_absmax"] = ("F32", math.ceil(blocks / NESTED_BLOCKSIZE))
        expected["weight.nested_quant_map"] = ("F32", 256)
    return expected


def _check_group(
    name: str,
    group: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[str, int | None]],
) -> None:
    where = group["weight"].path
    for suffix in [s for s in expected if s not in group] + [s for s in group if s not in expected]:
        if suffix == "weight_format" and suffix in expected:
            continue  # old versions of bitsandbytes did not write it
        what = "lacks" if suffix in expected else "holds, against its config.json,"
        raise ModelError(f"{where}: {what} {name}.{suffix}", "fetch the model again")
    for suffix, entry in group.items():
        dtype, count = expected[suffix]
        found = math.prod(entry.shape)
        if entry.dtype != dtype or found != (min(found, STATE_LIMIT) if count is None else count):
            raise ModelError(
                f"{where}: {entry.name} holds {found} {entry.dtype}, expected "
                f"{f'at most {STATE_LIMIT}' if count is None else count} {dtype}",
                "fetch the model again",
            )


def _read_state(
    name: str, entry: TensorEntry, shape: torch.Size, stored: Quantization
) -> dict[str, Any]:
    """The JSON object of a 4-bit linear, each of its fields as the architecture asks for it."""
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        raw = file.read(entry.end - entry.start)
    try:
        state = json.loads(raw.decode())
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{entry.path}: {entry.name} is not JSON", "fetch the model again"
        ) from error
    expected: dict[str, Any] = {
        "quant_type": stored.quant_type,
        "blocksize": BLOCKSIZE,
        "shape": list(shape),
    }
    if stored.double_quant:
        expected |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
    found = state if isinstance(state, dict) and not is_deep(state) else {}
    wrong = [key for key, value in expected.items() if found.get(key) != value]
    if found.get("dtype") not in STATE_DTYPES:
        wrong.append("dtype")
        expected["dtype"] = " or ".join(STATE_DTYPES)
    offset = found.get("nested_offset", 0.0)
    if stored.double_quant and not (
        isinstance(offset, (int, float)) and abs(offset) < LARGEST_OFFSET
    ):
        wrong.append("nested_offset")
        expected["nested_offset"] = "a number"
    if wrong:
        raise ModelError(
            f"{entry.path}: {name}: {wrong[0]} is {str(found.get(wrong[0]))[:60]}, expected "
            f"{expected[wrong[0]]}",
            "fetch the model again, or give the original 16-bit model",
        )
    return found


def stored_layer(
    linear: nn.Linear,
    stored: StoredLinear,
    quantization: Quantization,
    parts: Mapping[str, Tensor],
    device: torch.device,
) -> QuantizedLinear:
    """Our layer of a stored one, from its tensors as read; `linear` has its shape and its bias.

    Errors: `ModelError` where a map is not bitsandbytes' own.
    """
    entry = stored.entries["weight"]
    moved = {suffix: tensor.to(device, copy=True) for suffix, tensor in parts.items()}
    out_features, in_features = linear.out_features, linear.in_features
    if quantization.bits == 8:
        if "weight_format" in parts and int(parts["weight_format"].item()) != 0:
            raise ModelError(
                f"{entry.path}: {entry.name}_format is not 0: the rows are laid out for another "
                "device",
                "save the model again with a newer bitsandbytes",
            )
        rows = moved["weight"].view(out_features, in_features)
        return Linear8bit(in_features, out_features, rows, None, row_absmax=moved["SCB"].view(-1))
    assert quantization.quant_type is not None
    table, nested_table = code_tables(quantization.quant_type)
    tables = {"weight.quant_map": table, "weight.nested_quant_map": nested_table}
    for suffix, own in tables.items():
        if suffix in parts and not torch.allclose(
            parts[suffix].view(-1), own, rtol=0, atol=MAP_TOLERANCE
        ):
            raise ModelError(
                f"{entry.path}: {stored.entries[suffix].name} is not the table of "
                f"{quantization.quant_type}",
                "fetch the model again",
            )
    nested = {}
    if quantization.double_quant:
        table, shared = moved["weight.nested_quant_map"].view(-1), dynamic_map(device)
        nested = {
            "nested_absmax": moved["weight.nested_absmax"].view(-1),
            "nested_offset": torch.tensor(stored.nested_offset, device=device),
            # One table for all layers, unless an old file has another one to the last bit.
            "nested_map": shared if torch.equal(table, shared) else table,
        }
    return Linear4bit(
        in_features,
        out_features,
        moved["weight"].view(-1, 1),
        None,
        quant_type=quantization.quant_type,
        absmax=moved["weight.absmax"].view(-1),
        **nested,
    )
