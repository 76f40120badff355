"""Attention on the CPU: each row by itself, without a mask.

transformers isolates the rows of a pack by `position_ids` too, through a mask of (T, T) that makes
attention compute everything and throw most of it away. Here each segment of positions that begins
at 0 is one causal attention of its own size: at length 1024 and rows of 170 tokens a fifth of the
work. On other devices transformers' way stays: reading positions there would stop the queue.

Left out: sliding windows shorter than a row, soft caps; such models keep transformers' way as well.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.base.architecture import architecture_of
from qlora_kit.device.target import device_type, has_values
from qlora_kit.kernels.attention import Segment, causal_attention
from qlora_kit.kernels.matmul import matmul_dtype

NAME = "sdpa_rows"
PLANNED = "sdpa_planned"
_LONGEST_ROW: ContextVar[int | None] = ContextVar("longest_row", default=None)


def set_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model on the CPU attend within rows; returns whether it does now.

    The results are those of `sdpa` up to rounding, packed or not, with a cache or a mask too.
    """
    config = model.config
    if not architecture_of(config.model_type).known:
        # A mask may say what positions do not: alibi, chunks, a prefix.
        _attend_in_fp32(config, model.get_input_embeddings().weight)
        return False
    windowed = getattr(config, "sliding_window", None) is not None
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    weight = model.get_input_embeddings().weight
    if device_type(weight) == "cuda" and not has_values(weight):
        _plan_cuda_attention(config)
        return False
    if device_type(weight) == "cpu" and (windowed or capped):
        _attend_in_fp32(config, weight)
    if weight.device.type != "cpu" or windowed or capped or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    config._attn_implementation = NAME
    return True


@contextlib.contextmanager
def known_rows(packed: bool, longest: int | None = None) -> Iterator[None]:
    """Inside, positions without values are those of rows that begin at 0, or of packs.

    Of packs the first one stands for all: a row of `longest` tokens, and the rest. What attention
    takes for a pack comes and goes before the next one.

    transformers reads the values of positions to see whether a mask is needed, and makes one where
    there are none to read (5.23): a plan would count what no run has.
    """
    real = masking_utils.find_packed_sequence_indices
    before = _LONGEST_ROW.set(longest if packed else None)
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real
        _LONGEST_ROW.reset(before)


def _plan_cuda_attention(config: Any) -> None:
    """Let fake tensors on the CPU attend as `sdpa` does on CUDA."""
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(PLANNED, _flash)
        AttentionMaskInterface.register(PLANNED, sdpa_mask)
        config._attn_implementation = PLANNED


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
    """The library's attention of `name` on fp32 copies where the processor wants them."""
    dtype = matmul_dtype(query)
    attend = sdpa_attention_forward
    if name == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    mask = attention_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    parts = (x.to(dtype) for x in (query, key, value))
    output, _ = attend(module, *parts, mask, **options)
    return output.to(query.dtype), None


def _flash(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The kernel that torch takes on CUDA in 16 bits without a mask: keys are not repeated."""
    if attention_mask is not None or query.dtype is torch.float32:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    output, *_ = attend(query, key, value, dropout, True, scale=scaling)
    return output.transpose(1, 2), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where positions say everything: no padding on the left, no cache."""
    if attention_mask is None and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, T, D) queries, keys and values of fewer heads to (B, T, H, D)."""
    rows = _rows(query, key, attention_mask, position_ids)
    if attention_mask is None and query.shape[2] == key.shape[2] > 1 and not dropout:
        segments = _segments(rows) or [Segment(slice(None), 0, query.shape[2])]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale, segments).transpose(1, 2), None
    if rows is None:
        return _widened(
            "sdpa",
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "is_causal": True,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    sequences = []
    # With dropout, which the kernels above have not.
    # Taken apart by unbind and split, whose backward is one copy; that of a slice fills a tensor
    # of the whole length with zeros for each row.
    for *heads, lengths in zip(query.unbind(), key.unbind(), value.unbind(), rows, strict=True):
        parts = zip(*(torch.split(head, lengths, dim=1) for head in heads), strict=True)
        attended = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        sequences.append(torch.cat([part.transpose(0, 1) for part in attended]))
    return torch.stack(sequences), None


def _segments(rows: list[list[int]] | None) -> list[Segment]:
    """The rows of each sequence as parts of the batch."""
    return [
        Segment(slice(number, number + 1), end - length, end)
        for number, lengths in enumerate(rows or [])
        for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)
    ]


def _rows(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[list[int]] | None:
    """The lengths of each sequence's rows, or None where no sequence holds several."""
    if attention_mask is not None or position_ids is None:
        return None
    if query.shape[2] != key.shape[2] or position_ids.shape[0] != query.shape[0]:
        return None
    width = position_ids.shape[1]
    if not has_values(position_ids):
        longest = _LONGEST_ROW.get()
        if longest is None:
            return None
        longest = min(longest, width - 1)
        return [[longest, width - longest]]
    starts = [(row == 0).nonzero().flatten().tolist() for row in position_ids]
    if all(len(start) < 2 for start in starts):
        return None
    ends = [[*start, width] for start in starts]
    return [[last - first for first, last in itertools.pairwise(end)] for end in ends]
