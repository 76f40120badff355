"""What operations of a step do on a card: multiply-adds, bytes read and written, kernels.

Read off each operation as it is dispatched, with its own tensors: nothing here knows what a step or
a layer is. Only matmuls and attention have a formula, that of their arguments' shapes; every other
operation is one pass over its arguments and its results. A view is nothing.

Left out: what a kernel reads twice because it does not fit into the caches, and several kernels of
one operation where they are few (a sum that is split).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.device.target import heard_kernels, turns
from qlora_kit.device.transfer import TO_DEVICE, TO_HOST
from qlora_kit.memory.counter import StorageCounter

TRANSFER = "transfer"
KINDS = ("matmul", "dequantize", "attention", "elementwise", "loss", "optimizer", TRANSFER)
"""Of work, in the order in which they are shown; `elementwise` has norms and casts in it."""
NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("_unsafe_view", "lift_fresh", "device", "is_same_size", "_local_scalar_dense"),
}
"""Operations that launch no kernel and are no views by their schema."""
MATMULS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""By name, which argument is the first factor."""
PICKS = {"gather", "index", "index_select", "embedding"}
"""Operations that read as much of a large tensor as they give."""
PUTS = {"scatter", "scatter_add", "index_put"}
"""Operations that change as much of a large tensor as there are indices."""
TENSORS_AT_ONCE = 30
"""That one kernel of an operation on a list of tensors takes."""
CAUSAL = 0.5
BACKWARD_PASSES, BACKWARD_KERNELS = 2.5, 3
"""Of attention: its scores once more and four products, and what is summed before and after."""


class Work(NamedTuple):
    """An operation: a multiply-add is two FLOP; `wide` says that it multiplies in fp32."""

    kind: str
    flops: int
    bytes: int
    kernels: int
    wide: bool = False


@contextlib.contextmanager
def noted_work(counter: StorageCounter) -> Iterator[None]:
    """Inside, the counter's intervals have the work of what is done in them."""

    def note(work: Work | None) -> None:
        if work is not None:
            counter.intervals[-1].work[work] += 1

    counter.observer = lambda *operation: note(work_of(*operation))
    try:
        with heard_kernels(lambda *kernel: note(work_without_values(*kernel))):
            yield
    finally:
        counter.observer = None


def work_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Work | None:
    """The work of a dispatched operation, as often as its loop turns; None where it is none."""
    kind, name = _kind_of(func)
    if kind is None:
        return None
    results = list(_tensors((result,)))
    reads, writes = _passes(func, args, kwargs, results)
    size = sum(map(_size, reads)) + sum(map(_size, writes))
    if not size:
        return None
    flops, kernels, wide = 0, 1, False
    if kind == "matmul":
        first = MATMULS[name]
        left, right = args[first], args[first + 1]
        flops = 2 * left.numel() * right.shape[-1]
        wide = left.dtype is torch.float32
    elif kind == "attention":
        flops, kernels = _attention(func, args, kwargs)
    elif name in PICKS:
        size = 2 * sum(map(_size, results))
    elif name in PUTS:
        size = 3 * min(map(_size, reads))
    elif name.startswith(("_foreach", "_fused")):
        kernels = -(-len(args[0]) // TENSORS_AT_ONCE)
    return _times(Work(kind, flops, size, kernels, wide), turns())


def work_without_values(kernel: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Work:
    """The work of a kernel that is not called, for its tensors have no values.

    A copy between host and device has the bytes that it moves.
    """
    if kernel in (TO_HOST, TO_DEVICE):
        return _times(Work(TRANSFER, 0, sum(map(_size, reads)), 1), turns())
    size = sum(map(_size, reads)) + sum(map(_size, writes))
    return _times(Work(kernel, 0, size, 1), turns())


def _times(work: Work, count: int) -> Work:
    # A loop's turns are one entry with their sum: a kernel of them takes the part of one.
    if count == 1:
        return work
    return work._replace(
        flops=work.flops * count, bytes=work.bytes * count, kernels=work.kernels * count
    )


def moved_bytes(work: Mapping[Work, int]) -> int:
    """The bytes that go between host and device in an interval's work."""
    return sum(times * one.bytes for one, times in work.items() if one.kind == TRANSFER)


@functools.cache
def _kind_of(func: Any) -> tuple[str | None, str]:
    """What kind of work an operation is, or None, and its name without its overload's."""
    name = func.overloadpacket.__name__
    plain = name.rstrip("_") if name.rstrip("_") in MATMULS else name
    if func.is_view or name in NOTHING:
        return None, name
    if plain in MATMULS:
        return "matmul", plain
    if "attention" in name or name.startswith("attend"):
        return "attention", name
    decodes = "dequantize" in name or "decode" in name
    return ("dequantize" if decodes else "elementwise"), name.rstrip("_")


def _passes(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes."""
    only_written, written = _written(func)
    given = dict(enumerate(args)) | kwargs
    reads = list(_tensors(value for key, value in given.items() if key not in only_written))
    writes = list(_tensors(given[key] for key in written if key in given))
    return reads, writes or results


@functools.cache
def _written(func: Any) -> tuple[frozenset[Any], tuple[Any, ...]]:
    """Keys of the arguments that are written and not read, and of all that are written."""
    name = func.overloadpacket.__name__
    blind = name in ("copy_", "zero_", "fill_") or func._schema.overload_name.endswith("out")
    only, written = set[Any](), list[Any]()
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        keys = (argument.name,) if argument.kwarg_only else (place, argument.name)
        written += keys
        if blind:
            only.update(keys)
    return frozenset(only), tuple(written)


def _attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, int]:
    """FLOP and kernels of attention: of queries (B, H, T, d), or of packed rows (N, H, d)."""
    name = func.overloadpacket.__name__
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}  # noqa: B905
    given |= kwargs
    query, key = given["query"], given["key"]
    if query.dim() == 4:
        pairs = math.prod(query.shape[:2]) * query.shape[2] * key.shape[2]
    else:
        pairs = query.shape[1] * query.shape[0] * int(given.get("max_k") or key.shape[0])
    causal = given.get("is_causal", given.get("causal", name.startswith("attend")))
    if "ends" in given:
        rows = zip(given["starts"], given["ends"], strict=True)
        pairs = query.shape[1] * sum((end - start) ** 2 for start, end in rows)
    if "lengths" in given:
        lengths, window = given["lengths"], given["window"] or max(given["lengths"])
        # A window hides a triangle from each row; in a plan one sequence's rows stand for all.
        seen = sum(n * n - max(0, n - window) ** 2 for n in lengths)
        pairs = query.shape[1] * seen * (query.shape[0] * query.shape[2] // sum(lengths))
    flops = 4 * pairs * query.shape[-1] * (CAUSAL if causal else 1.0)
    if "backward" in name:
        return int(BACKWARD_PASSES * flops), BACKWARD_KERNELS
    return int(flops), 1


def _size(tensor: Tensor) -> int:
    """The bytes that a pass over a tensor touches: an expanded one is as large as its storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
