"""Attention without a mask: each row by itself, on the CPU and on CUDA, and in the plans of both.

transformers isolates the rows of a pack by `position_ids`, and sliding windows, through a mask of
(T, T) that makes attention compute everything and throw most of it away. Here each row is one
causal attention of its own size. The host knows the rows of a batch since it was collated: nothing
is read back from a device. On CUDA the kernel follows from the card's capability, the dtype and the
head's width (`kernels/attention_cuda.py`); a plan's fake tensors take the same way with the card
that they are planned for.

What keeps the library's attention and its masks: padding on the left and decoding with a cache, and
families without a record, whose masks may say what positions do not (alibi, chunks, a prefix).
Likewise AMD's cards, whose builds of these kernels have no windows, and a base with dropout of
attention that has windows or soft caps or, on CUDA, whose rows are packed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.placed_embedding import weight_on_device
from qlora_kit.data.batch import Batch
from qlora_kit.device.target import (
    Capability,
    capability,
    device_type,
    has_own_memory,
    has_values,
    is_rocm,
    known_inside,
    set_inside,
)
from qlora_kit.kernels.attention import Segment, causal_attention
from qlora_kit.kernels.attention_cuda import Rows, attend_packed, attention_kernel
from qlora_kit.kernels.matmul import matmul_dtype

NAMES = {"sdpa": "sdpa_rows", "eager": "eager_rows"}
"""What a model's attention is called that attends by rows, by the library's that it stands for."""
LIBRARY = {ours: name for name, ours in NAMES.items()} | {f"{name}_fp32": name for name in NAMES}
"""The library's attention that each of ours stands for."""
ROWS = "attention_rows"
"""The option of a forward pass that tells attention the `Rows` of a batch."""
_BATCH: ContextVar[Batch | None] = ContextVar("batch", default=None)
_PACKED: ContextVar[tuple[None] | None] = ContextVar("packed", default=None)
"""Which packed sequence each position is of, where that is known: None, of rows that begin at 0."""


def set_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model attend within rows, without a mask; returns whether it does now.

    The results are those of the library's attention up to rounding, with a cache or a mask too.
    """
    config = model.config
    weight = weight_on_device(model)
    name = config._attn_implementation
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    windowed = getattr(config, "sliding_window", None) is not None
    drops = bool(getattr(config, "attention_dropout", 0)) and (capped or windowed)
    # Of a text model "vision" says nothing: it is about images.
    backwards = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    expected = "eager" if capped else "sdpa"  # sdpa has no soft cap
    if name in NAMES.values():
        return True
    if not architecture_of(config.model_type).known or name != expected or drops or backwards:
        _attend_in_fp32(config, weight)
        return False
    if device_type(weight) not in ("cpu", "cuda") or (capability(weight) and is_rocm()):
        return False
    make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(NAMES[name], functools.partial(attend, library=name))
    AttentionMaskInterface.register(NAMES[name], functools.partial(_mask, make))
    config._attn_implementation = NAMES[name]
    return True


@contextlib.contextmanager
def within_rows(model: PreTrainedModel, batch: Batch) -> Iterator[dict[str, Any]]:
    """Inside, a forward pass of `model` on `batch` reads no positions; yields options for it.

    transformers reads the values of positions to see whether rows are packed, which waits for the
    device, and makes a mask where there are none to read (5.23): a plan would count what no run
    has.
    """
    config, packed = model.config, batch["packed"]
    drops = getattr(config, "attention_dropout", 0) and device_type(batch["input_ids"]) != "cpu"
    ours = config._attn_implementation in NAMES.values() and not (packed and drops)
    if packed and not ours:
        yield {}
        return
    rows = Rows(batch["row_lengths"], batch["row_starts"]) if ours else None
    before = _BATCH.set(batch)
    try:
        with positions_unread():
            yield {} if rows is None else {ROWS: rows}
    finally:
        _BATCH.reset(before)


def positions_unread() -> AbstractContextManager[None]:
    """Inside, transformers takes all positions for those of rows that begin at 0."""
    return set_inside(_PACKED, (None,))


masking_utils.find_packed_sequence_indices = known_inside(
    _PACKED, masking_utils.find_packed_sequence_indices
)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    attention_rows: Rows | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    library: str = "sdpa",
    card: Capability | None = None,
    spends_grad: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, T, d) queries, keys and values of fewer heads to (B, T, H, d).

    `card` is the capability of the card whose kernels attend; without it that of the tensors' own.
    `spends_grad` says that backward may write over the gradient by the output.
    """
    card, batch = card or capability(query), _BATCH.get()
    if batch is not None and attention_rows is None:
        raise AssertionError(f"{type(module).__name__} was not told the rows of its batch")
    parts, scale = (query, key, value), query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None or not query.shape[2] == key.shape[2] > 1:
        if softcap is not None:
            kwargs["softcap"] = softcap
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return _widened(library, module, *parts, attention_mask, **options)
    if card is not None:
        if dropout:
            output = _dropped_on_cuda(*parts, dropout, scale, card)
        else:
            kernel = attention_kernel(card, query.dtype, query.shape[-1], softcap)
            if kernel != "blocks":
                rows = attention_rows
                output = attend_packed(*parts, scale, kernel, rows, sliding_window, spends_grad)
            else:
                segments = _segments(query, attention_rows.lengths if attention_rows else None)
                output = causal_attention(*parts, scale, segments, sliding_window, softcap)
        return output.transpose(1, 2), None
    lengths = attention_rows.lengths if attention_rows else _lengths(query, position_ids)
    if dropout:
        return _dropped_on_cpu(*parts, lengths, dropout, scale), None
    segments = _segments(query, lengths)
    output = causal_attention(*parts, scale, segments, sliding_window, softcap)
    return output.transpose(1, 2), None


def _mask(make: Any, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """No mask where the rows say everything: no padding on the left, no cache.

    On a device that has to be waited for, that is where the rows are known. Of one query a mask is
    made without a look at what it hides.
    """
    waits = has_own_memory(torch.device(kwargs.get("device", "cpu")))
    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        if _BATCH.get() is not None or not waits:
            return None
    elif waits and kwargs.get("q_length") == 1 and attention_mask is not None:
        kwargs["allow_is_causal_skip"] = False
    return make(*args, attention_mask=attention_mask, **kwargs)


def _attend_in_fp32(config: Any, like: Tensor) -> None:
    """Let the library's attention multiply in fp32 where the processor does not in 16 bits."""
    name = config._attn_implementation
    if matmul_dtype(like) is like.dtype or name not in ("sdpa", "eager"):
        return
    AttentionInterface.register(f"{name}_fp32", functools.partial(_widened, name))
    AttentionMaskInterface.register(
        f"{name}_fp32", masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
    )
    config._attn_implementation = f"{name}_fp32"


def _widened(
    name: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's attention of `name`, on fp32 copies where the processor wants them."""
    dtype = matmul_dtype(query)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if name == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    mask = attention_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    parts = (x.to(dtype) for x in (query, key, value))
    output, _ = attend(module, *parts, mask, **options)
    return output.to(query.dtype), None


def _dropped_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, card: Capability
) -> Tensor:
    """Attention with dropout of whole sequences, (B, H, T, d), by the kernels of the library."""
    if attention_kernel(card, query.dtype, query.shape[-1], drops=True) == "flash":
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        output, *_ = attend(query, key, value, dropout, True, scale=scale)
        return output  # type: ignore[no-any-return]
    shared = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(shared, 1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, keys, values, dropout_p=dropout, is_causal=True, scale=scale
    )


def _dropped_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Sequence[int]] | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """Attention with dropout, row by row, (B, T, H, d), which our kernels have not."""
    dtype = matmul_dtype(query)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "is_causal": True,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    rows = rows or [[query.shape[2]]] * query.shape[0]
    sequences = []
    # Taken apart by unbind and split, whose backward is one copy; that of a slice fills a tensor
    # of the whole length with zeros for each row.
    tensors = (x.to(dtype).unbind() for x in (query, key, value))
    for *heads, lengths in zip(*tensors, rows, strict=True):
        parts = zip(*(torch.split(head, list(lengths), dim=1) for head in heads), strict=True)
        attended = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        sequences.append(torch.cat([part.transpose(0, 1) for part in attended]))
    return torch.stack(sequences).to(query.dtype)


def _segments(query: Tensor, rows: Sequence[Sequence[int]] | None) -> list[Segment]:
    """The rows of each sequence as parts of the batch, which is one where each has one row."""
    if rows is None or all(len(lengths) == 1 for lengths in rows):
        return [Segment(slice(None), 0, query.shape[2])]
    return [
        Segment(slice(number, number + 1), end - length, end)
        for number, lengths in enumerate(rows)
        for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)
    ]


def _lengths(query: Tensor, position_ids: Tensor | None) -> list[list[int]] | None:
    """The lengths of each sequence's rows by their positions, or None where none holds several.

    For passes outside `within_rows`, on the CPU, where reading waits for nothing.
    """
    if position_ids is None or not has_values(position_ids):
        return None
    if position_ids.shape != (query.shape[0], query.shape[2]):
        return None
    width = position_ids.shape[1]
    starts = [(row == 0).nonzero().flatten().tolist() for row in position_ids]
    if all(len(start) < 2 for start in starts):
        return None
    ends = [[*start, width] for start in starts]
    return [[last - first for first, last in itertools.pairwise(end)] for end in ends]
