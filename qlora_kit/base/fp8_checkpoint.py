"""Weights that are stored as 8-bit floats: their scales, checked, and the numbers that they mean.

A value is the 8-bit float times the scale of its block, multiplied in fp32 and rounded once to the
dtype that is held, as transformers does it (`Fp8Dequantize`); one difference: where the last block
of a row or a column is a part of one, its place follows from the block's size, as the tools that
write such files have it. So the logits are those of a 16-bit checkpoint made of the same numbers,
and quantizing to 4 or 8 bits goes on from there. Tensor by tensor: the bytes as read, and the
numbers in memory that is used again, are all that is there at once.

Scales of activations and of a KV cache (`input_scale`, `k_scale` ...) have no use here: training
multiplies in 16 bits. They are left out. The file decides which weights are 8-bit floats, whatever
the names in config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_kit.base.fp8_scheme import SCALES, Blocks, Fp8Scheme
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.base.skipped import listed_modules
from qlora_kit.base.tensors import NumberChecks, Read, Reader, check_finite, read_tensors
from qlora_kit.device.target import dtype_name, representative
from qlora_kit.errors import ModelError

WEIGHT = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""U8 are exponents as bytes, which is what F8_E8M0 holds."""
UNUSED = (
    *("input_scale", "activation_scale", "input_scale_inv", "qscale_act"),
    *("k_scale", "v_scale", "q_scale"),
)
"""Names of scales that weights have no part in."""
AT_ONCE = 2**22
"""Elements that are multiplied in fp32 at a time."""
REMEDY = "fetch the model again, or give the original 16-bit model"


@dataclass(frozen=True)
class ScaledWeight:
    """The scales of one weight (out, in) of 8-bit floats, and the blocks that they belong to."""

    scales: TensorEntry
    blocks: Blocks


def split_scaled(
    entries: Mapping[str, TensorEntry],
    scheme: Fp8Scheme | None,
    expected: Mapping[str, torch.Size],
    where: Path,
) -> tuple[dict[str, ScaledWeight], dict[str, TensorEntry]]:
    """The scales of a checkpoint by the name of their weight, and the tensors that hold numbers.

    `expected` are the tensors of the architecture. Only headers are looked at.
    Errors: `ModelError` with file and tensor.
    """
    scaled: dict[str, ScaledWeight] = {}
    taken = set()
    for name, entry in entries.items():
        if not entry.dtype.startswith("F8_") or name not in expected:
            continue
        names = [f"{name.removesuffix('.weight')}.{suffix}" for suffix in SCALES]
        found = [one for one in names if one in entries]
        if scheme is None:
            raise ModelError(
                f"{entry.path}: {entry.name} is {entry.dtype}, and config.json has no "
                "quantization_config that says how it is scaled",
                REMEDY,
            )
        if entry.dtype != WEIGHT or len(entry.shape) != 2 or not name.endswith(".weight"):
            raise ModelError(
                f"{entry.path}: {entry.name} is {list(entry.shape)} of {entry.dtype}, expected a "
                f"matrix of {WEIGHT}",
                REMEDY,
            )
        if len(found) != 1:
            many = f"has {' and '.join(found)}" if found else f"lacks {' or '.join(names)}"
            raise ModelError(f"{entry.path}: {entry.name} is {entry.dtype} and {many}", REMEDY)
        taken.add(found[0])
        suffix = found[0].rpartition(".")[2]
        blocks = _blocks(entries[found[0]], entry, scheme.blocks.get(suffix, ()))
        scaled[name] = ScaledWeight(entries[found[0]], blocks)
    if scheme is None:
        return {}, dict(entries)
    if not scaled:
        raise ModelError(
            f"{where}: config.json says 8-bit floats, and no tensor of the model is one",
            "fetch the model again, or remove quantization_config from config.json",
        )
    lonely = [
        entry
        for name, entry in entries.items()
        if name not in taken and name.rpartition(".")[2] in SCALES and name not in expected
    ]
    if lonely:
        raise ModelError(
            f"{lonely[0].path}: {lonely[0].name} has no weight of 8-bit floats beside it", REMEDY
        )
    plain = {
        name: entry
        for name, entry in entries.items()
        if name in expected or (name not in taken and name.rpartition(".")[2] not in UNUSED)
    }
    return scaled, plain


def _blocks(scales: TensorEntry, weight: TensorEntry, allowed: tuple[Blocks, ...]) -> Blocks:
    """Which of the `allowed` blocks the scales are those of. Errors: `ModelError`."""
    if scales.dtype not in SCALE_DTYPES:
        raise ModelError(
            f"{scales.path}: {scales.name} is {scales.dtype}, expected {', '.join(SCALE_DTYPES)}",
            REMEDY,
        )
    for blocks in allowed:
        grid = blocks.grid(weight.shape)
        # One number may be without a dimension, one a row be a list.
        if scales.shape == grid or (math.prod(scales.shape) == grid[0] and grid[1] == 1):
            return blocks
    grids = " or ".join(str(list(blocks.grid(weight.shape))) for blocks in allowed)
    raise ModelError(
        f"{scales.path}: {scales.name} is {list(scales.shape)} for {list(weight.shape)} values, "
        f"expected {grids or 'none, by config.json'}",
        REMEDY,
    )


def assume_scaled(
    entries: Mapping[str, TensorEntry], linears: Mapping[str, object], scheme: Fp8Scheme
) -> tuple[dict[str, ScaledWeight], dict[str, TensorEntry]]:
    """The scales, and all headers, of a checkpoint that is not here: as config.json has it.

    `entries` are those of a checkpoint of plain numbers; `linears` names what would be scaled.
    """
    scaled, made = {}, dict(entries)
    suffix = next(one for one in SCALES if one in scheme.blocks)
    left = listed_modules(scheme.skipped, linears)
    for owner in linears:
        name = f"{owner}.weight"
        if name not in entries or owner in left:
            continue
        entry = entries[name]
        size = math.prod(entry.shape)
        start = entry.start
        made[name] = TensorEntry(entry.name, WEIGHT, entry.shape, entry.path, start, start + size)
        blocks = scheme.blocks[suffix][0]
        grid = blocks.grid(entry.shape)
        key = f"{owner}.{suffix}"
        scales = TensorEntry(key, "F32", grid, entry.path, 0, 4 * math.prod(grid))
        scaled[name], made[key] = ScaledWeight(scales, blocks), scales
    return scaled, made


def read_numbers(
    entries: Mapping[str, TensorEntry],
    scaled: Mapping[str, ScaledWeight],
    dtype: torch.dtype,
    device: torch.device,
    read: Read | None = None,
    kept: Mapping[str, torch.dtype] | None = None,
    checks: NumberChecks | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As `read_tensors`; what is scaled comes as numbers of `dtype` (out, in).

    Each is valid until the next one is asked for. Errors: as there, and `NumericError` with the
    tensor's name where a number or a scale is not finite.
    """
    if read is None:
        with Reader() as own:
            yield from read_numbers(entries, scaled, dtype, device, own, kept, checks)
        return
    sizes = (math.prod(entries[name].shape) for name in scaled if name in entries)
    space = torch.empty(max(sizes, default=0), dtype=dtype, device=device)
    # Memory that is freed between small results would leave holes: 0.3 GiB of a 1.1 B model.
    strips = (
        entries[name].shape[1] * min(one.blocks.rows or 1, entries[name].shape[0])
        for name, one in scaled.items()
        if name in entries
    )
    work = torch.empty(max(min(AT_ONCE, space.numel()), *strips, 0), device=device)
    tensors = read_tensors(entries, read, device=device, kept=kept, checks=checks)
    for name, tensor in tensors:
        found = scaled.get(name)
        if found is None:
            yield name, tensor
            continue
        scales = _read_scales(found, read)
        numbers = space[: tensor.numel()].view(tensor.shape)
        dequantize_into(numbers, tensor, scales, found.blocks, work)
        where = f"{entries[name].path}: {entries[name].name} in {dtype_name(dtype)}"
        check_finite(numbers, where, checks=checks)
        yield name, numbers


def _read_scales(weight: ScaledWeight, read: Read) -> Tensor:
    """The scales as stored, on the CPU; exponents of powers of two as a dtype that has them."""
    entry = weight.scales
    buffer = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    read(entry, buffer)
    exponents = entry.dtype in ("F8_E8M0", "U8")
    dtype = torch.float8_e8m0fnu if exponents else entry.torch_dtype
    scales = buffer.view(dtype).view(entry.shape).float()
    check_finite(scales, f"{entry.path}: {entry.name}")
    return scales


def dequantize_into(
    out: Tensor, weight: Tensor, scales: Tensor, blocks: Blocks, work: Tensor
) -> None:
    """Write `weight` (rows, columns) of 8-bit floats, times the scales of its blocks, into `out`.

    `scales` are fp32, as many as there are blocks; `out` has any dtype, and the device of it.
    `work` (at least one row of blocks) is fp32 memory on that device, some rows at a time.
    """
    rows, columns = weight.shape
    high, wide = blocks.rows or rows, blocks.columns or columns
    scales = scales.to(out.device).view(math.ceil(rows / high), math.ceil(columns / wide))
    one = len(scales) == 1
    step = max(1, work.numel() // (columns * (1 if one else high))) * (1 if one else high)
    for start in representative(range(0, rows, step), weight):
        piece = weight[start : start + step]
        numbers = work[: piece.numel()].view(piece.shape).copy_(piece)
        first = 0 if one else start // high
        whole = 0 if one else len(piece) // high * high
        for part, height in ((numbers[:whole], high), (numbers[whole:], len(piece) - whole)):
            if len(part):
                factors = scales[first : first + len(part) // height]
                _multiply(part.view(-1, height, columns), factors, wide)
                first += len(factors)
        out[start : start + step].copy_(numbers)


def _multiply(numbers: Tensor, factors: Tensor, wide: int) -> None:
    """Multiply rows of blocks (k, height, columns) by their scales (k, blocks), in place."""
    count, height, columns = numbers.shape
    full = columns // wide
    inner = numbers[..., : full * wide].view(count, height, full, wide)
    inner.mul_(factors[:, None, :full, None])
    if full * wide < columns:
        numbers[..., full * wide :].mul_(factors[:, None, full:])
