"""Matmuls of 16-bit tensors: in fp32 on a processor that has no instructions for their dtype.

There `grad @ W` in bf16 takes 25 times as long as in fp32, and a step of a small model minutes. So
what is stored in 16 bits is multiplied in fp32 and rounded once, as the instructions would: only
the order of sums differs. Tokens in fp32 are multiplied by a weight in 16 bits in the same way, and
not rounded. A weight comes part by part through a workspace, so that no copy of it is ever whole.
On a GPU, and where the processor has the instructions, these are torch's calls.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.device.target import device_type, has_values, is_native, is_rocm, representative
from qlora_kit.kernels.workspace import workspace

PART = 2**20
"""Entries of a weight that are in fp32 at once: 4 MiB, read again out of a cache."""
FEW_TOKENS = 16
"""Of a step of decoding; in prompts there are more."""
SCALED_AT_ONCE = 32
"""Tokens that `scale_columns` multiplies at once on the CPU."""


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What tensors like `x` are multiplied in: their own dtype, or fp32."""
    return x.dtype if device_type(x) != "cpu" or is_native(x.dtype) else torch.float32


def adapter_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What tokens `x` (..., n) are multiplied in with an adapter of a `dtype`.

    On a CPU tokens in fp32 stay so: in 16 bits a row would be rounded beside many others, and not
    alone. Few tokens of 16 bits too are multiplied in fp32 there: a product in 16 bits is a call of
    20 us, whatever its size, and with matrices as small as these it is done in fp32 before that.
    """
    few = x.dtype is torch.float32 or x.numel() <= FEW_TOKENS * x.shape[-1]
    return torch.float32 if few and device_type(x) == "cpu" else dtype


def weight_parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts (some, in) of a `weight` (out, in) in `dtype`, with the slices of out that they are.

    One part where the weight has that dtype. Each is valid until the next one is asked for.
    """
    if weight.dtype is dtype:
        yield slice(None), weight
        return
    out_features, in_features = weight.shape
    step = max(1, min(out_features, PART // in_features))
    for start in representative(range(0, out_features, step), weight):
        part = weight[start : start + step]
        space = workspace(part.numel(), dtype, weight).view(part.shape)
        yield slice(start, start + part.shape[0]), space.copy_(part)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """`x W^T * scales + bias`: `x` (..., in), `weight` (out, in), `scales` (out,) in fp32.

    With `scales` the weight is int8.
    """
    dtype = matmul_dtype(x)
    if dtype is x.dtype is weight.dtype:
        return F.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    # (..., in) to (N, in), and (..., out) to (N, out): N tokens, in any number of dimensions.
    tokens, results = x.reshape(-1, x.shape[-1]).to(dtype), y.view(-1, weight.shape[0])
    if dtype is x.dtype and scales is None:
        linear_into(results, tokens, weight, bias)
        return y
    for columns, part in weight_parts(weight, dtype):
        values = tokens @ part.t()
        if scales is not None:
            values.mul_(scales[columns])
        if bias is not None:
            values.add_(bias[columns])
        results[:, columns].copy_(values)
        del values  # before the next ones come
    return y


def linear_into(out: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`tokens W^T + bias` into `out` (N, out), in its dtype, which `tokens` (N, in) have.

    A `weight` (out, in) of another dtype comes in parts, each of which is some columns of `out`.
    """
    for columns, part in weight_parts(weight, out.dtype):
        if bias is None:
            torch.mm(tokens, part.t(), out=out[:, columns])
        else:
            torch.addmm(bias[columns].to(out.dtype), tokens, part.t(), out=out[:, columns])


def grad_input(
    grad: Tensor, weight: Tensor, total: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """`(grad * scales) W`: `grad` (..., out), `weight` (out, in); added to `total` if given.

    `total` (..., in) is changed in place and returned. `scales` are as in `linear`.
    """
    dtype = matmul_dtype(grad)
    if dtype is grad.dtype is weight.dtype:
        if total is None:
            return grad @ weight
        total.view(-1, weight.shape[1]).addmm_(grad.reshape(-1, weight.shape[0]), weight)
        return total
    tokens = grad.reshape(-1, weight.shape[0]).to(dtype, copy=scales is not None)  # (N, out)
    if scales is not None:
        tokens.mul_(scales)
    if total is not None and total.dtype is dtype is grad.dtype:
        result = total.view(-1, weight.shape[1])
    else:
        result = tokens.new_zeros(tokens.shape[0], weight.shape[1])  # (N, in)
    for columns, part in weight_parts(weight, dtype):
        result.addmm_(tokens[:, columns], part)
    if total is None:
        return result.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
    if total.dtype is not dtype or grad.dtype is not dtype:
        total.view(-1, weight.shape[1]).add_(result)
    return total


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left` (m, k) times `right` (k, n), or b of both, in the dtype of `left`."""
    dtype = matmul_dtype(left)
    if dtype is left.dtype:
        return left @ right
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """`left` (m, k) times `right` (k, n) in fp32: on CUDA the sum, not rounded to 16 bits first.

    There it is one kernel, where a product in 16 bits takes another one for the cast.
    """
    if _gives_fp32(left):
        return torch.ops.aten.mm.dtype(left, right, torch.float32)  # type: ignore[no-any-return]
    return matmul(left, right).float()


def add_matmul(y: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """`y += alpha * left @ right` in place: (m, n), (m, k) and (k, n), or b of each."""
    if left.dtype is y.dtype is matmul_dtype(left):
        add = y.addmm_ if y.dim() == 2 else y.baddbmm_
        add(left, right, alpha=alpha)
    elif left.dtype is matmul_dtype(left):
        y.add_(left @ right, alpha=alpha)
    else:
        y.add_(left.float() @ right.float(), alpha=alpha)


def scale_columns(tokens: Tensor, scales: Tensor, out: Tensor) -> None:
    """16-bit `tokens` (..., n) times fp32 `scales` (n,), rounded once, into `out`.

    Few at once on the CPU: torch makes fp32 copies of both sides, which then stay in cache.
    """
    tokens, out = tokens.reshape(-1, tokens.shape[-1]), out.view(-1, tokens.shape[-1])
    step = SCALED_AT_ONCE if device_type(tokens) == "cpu" else max(1, tokens.shape[0])
    for start in representative(range(0, tokens.shape[0], step), tokens):
        torch.mul(tokens[start : start + step], scales, out=out[start : start + step])


def bmm_to_fp32(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`left` (N, m, k) times `right` (N, k, n) into fp32 `out` (N, m, n), not rounded in between.

    CUDA multiplies 16 bits and gives fp32; elsewhere both sides become fp32.
    """
    if not _gives_fp32(left):
        torch.bmm(left.float(), right.float(), out=out)
        return
    try:
        torch.ops.aten.bmm.dtype_out(left, right, torch.float32, out=out)
    except NotImplementedError:
        if has_values(out):
            raise
        # A plan: torch 2.11 has no shapes of it, and it makes nothing.


def _gives_fp32(x: Tensor) -> bool:
    """Whether tensors like `x`, of 16 bits, can be multiplied into fp32 by one kernel.

    On CUDA, since torch 2.8. Its builds for ROCm have the operations too, and some of them (2.9)
    refuse to run them.
    """
    there = hasattr(torch.ops.aten.mm, "dtype") and not is_rocm()
    return there and x.dtype in (torch.bfloat16, torch.float16) and device_type(x) == "cuda"
