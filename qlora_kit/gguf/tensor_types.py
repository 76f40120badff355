"""The types of tensors in a GGUF: which one a tensor gets, and its bytes.

Matrices get the type that is asked for. What has one row (norms, biases, the factors of a rotary
embedding) stays in F32, as llama.cpp wants it. Blocks of 32 numbers do not span rows: a matrix
whose rows are no multiple of 32 is F16. With 4-bit blocks the head is Q8_0, or the embedding where
it is the head as well: every token's probability hangs on it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qlora_kit.base.tensors import check_finite
from qlora_kit.errors import NumericError
from qlora_kit.gguf.layout import import_gguf

KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""The types by the names that --dtype has for them."""
BLOCKS = {"Q8_0": (32, 34), "Q4_0": (32, 18)}
"""Numbers and bytes of a block; its first two bytes are the scale in fp16."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AT_ONCE = 2**22
"""Numbers of a tensor that are written at once."""
WIDER = "use a wider --dtype, such as bf16 or f32"


def kind_of(shape: Sequence[int], asked: str, is_head: bool) -> str:
    """The type of a tensor of this shape in a file whose type is `asked`."""
    if len(shape) < 2:
        return "F32"
    if asked in BLOCKS and shape[-1] % BLOCKS[asked][0]:
        return "F16"
    return "Q8_0" if asked == "Q4_0" and is_head else asked


def nbytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor of a type."""
    numbers, size = BLOCKS.get(kind) or (1, FLOATS[kind].itemsize)
    return math.prod(shape) // numbers * size


def encode(tensor: Tensor, kind: str, name: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor in a type, some rows at a time: no second whole of it is there.

    Errors: `NumericError` for what is not finite in it.
    """
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    step = max(1, AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        yield _encoded(rows[start : start + step], kind, name)


def _encoded(rows: Tensor, kind: str, name: str) -> np.ndarray:
    if kind in FLOATS:
        made = rows.to("cpu", FLOATS[kind]).contiguous()
        check_finite(made, f"{name} of the export in {kind}", WIDER)
        return made.view(-1).view(torch.uint8).numpy()
    gguf = import_gguf()
    numbers = rows.to("cpu", torch.float32).contiguous()
    check_finite(numbers, f"{name} of the export", WIDER)
    with np.errstate(over="ignore"):  # it is looked at below
        blocks = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind])
    found: np.ndarray = blocks.reshape(-1, BLOCKS[kind][1])
    if bad := int((~np.isfinite(found[:, :2].copy().view(np.float16))).sum()):
        raise NumericError(f"{name}: {bad} scales of the export in {kind} are above fp16's", WIDER)
    return found.reshape(-1)
