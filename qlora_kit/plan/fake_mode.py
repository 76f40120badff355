"""Fake tensors whose operations are asked for once: each further result is made like the first.

An operation on fake tensors gives what follows from their shapes, strides and dtypes alone. torch
remembers that too, with keys that serve symbolic sizes and devices that change; a plan has neither,
and a step asks the same some thousand times. So what torch has answered is noted here by the little
that decides it, and made again without asking: a tensor of its own memory, a view of an argument,
an argument itself, or nothing. What is not one of these is always asked.

A result is noted only if a copy that is made from the note equals it; a test compares the intervals
of whole plans with those on torch's own fake tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlora_kit.device.target import Capability, planned_device
from qlora_kit.kernels.workspace import own_workspace, tagged_workspace

PLAIN = {
    *(int, float, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
"""Types of arguments whose values say all."""
DEPENDS_ON_MORE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}


class _Made(NamedTuple):
    """A tensor that an operation gives: the argument `same`, or a new one.

    A new one has memory of its own, or that of the tensor `view_of` among the arguments.
    """

    same: int | None
    view_of: int | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


class _Result(NamedTuple):
    """What an operation gives, in a `container` where it gives several; or None."""

    container: type | None
    made: tuple[_Made, ...]


class FakeMode(FakeTensorMode):
    """`FakeTensorMode` for real sizes, which also takes real tensors."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]
        self._known: dict[Any, _Result | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's compiler is not asked to leave every operation alone, which takes its time.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        key = self._key(func, args, kwargs, tensors) if _is_lasting(func) else None
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if (known := self._known.get(key)) is not None:
            return self._again(known, tensors)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self._known:
            self._known[key] = self._noted(result, tensors)
        return result

    def _key(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[FakeTensor]) -> Any:
        """What decides the result, None where that is not known; adds the arguments' `tensors`.

        Those that are given by name, as those that are written, come first. Real ones are known
        where nothing is given that could lie in their memory.
        """
        real = not func._schema.returns
        key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        for name, value in kwargs.items():
            key.append(name)
            if not self._add(key, (value,), tensors, real):
                return None
        return tuple(key) if self._add(key, args, tensors, real) else None

    def _add(
        self, key: list[Any], values: Iterable[Any], tensors: list[FakeTensor], real: bool
    ) -> bool:
        """Add what is to be known of arguments; False where one is of another type."""
        for value in values:
            kind = type(value)
            if kind in PLAIN:
                key += (kind, value)
            elif isinstance(value, FakeTensor):
                if not self._is_plain(value):
                    return False
                tensors.append(value)
                shape, stride, offset = value.shape, value.stride(), value.storage_offset()
                key += (shape, stride, offset, value.dtype, value.fake_device)
            elif kind is list or kind is tuple:
                key.append(len(value))
                if not self._add(key, value, tensors, real):
                    return False
            elif real and isinstance(value, Tensor):
                key += (kind, value.shape, value.stride(), value.dtype, value.device)
            else:
                return False
        return True

    def _is_plain(self, tensor: FakeTensor) -> bool:
        """Whether a tensor is one of this mode, has no values, and is strided and real."""
        return (
            tensor.fake_mode is self
            and tensor.constant is None
            and tensor.layout is torch.strided
            and not tensor.dtype.is_complex
        )

    def _noted(self, result: Any, tensors: list[FakeTensor]) -> _Result | None:
        """How a result is made again; None where it is not known how."""
        if result is None:
            return _Result(None, ())
        several = type(result) in (list, tuple)
        found = result if several else (result,)
        made = []
        for one in found:
            if not isinstance(one, FakeTensor) or not self._is_plain(one) or one.requires_grad:
                return None
            made.append(_made(one, tensors))
        noted = _Result(type(result) if several else Tensor, tuple(made))
        again = self._again(noted, tensors)
        pairs = zip(found, again if several else (again,), strict=True)
        return noted if all(_equal(*pair) for pair in pairs) else None

    def _again(self, result: _Result, tensors: list[FakeTensor]) -> Any:
        container, made = result
        if container is None:
            return None
        if container is Tensor:
            return self._tensor(made[0], tensors)
        return container(self._tensor(one, tensors) for one in made)

    def _tensor(self, made: _Made, tensors: list[FakeTensor]) -> FakeTensor:
        same, view_of, shape, stride, offset, dtype, device = made
        if same is not None:
            return tensors[same]
        if view_of is None:
            there = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            there = torch.empty(0, dtype=dtype, device="meta")
            there.set_(tensors[view_of].untyped_storage(), offset, shape, stride)  # type: ignore[call-overload]
        return FakeTensor(self, there, device)


@contextlib.contextmanager
def as_planned(
    device: torch.device,
    capability: Capability | None,
    workspace: dict[torch.dtype, Tensor],
    tag: Callable[[str, Iterable[Tensor]], None],
) -> Iterator[None]:
    """Inside, fake tensors stand for tensors on a device, whose workspace is kept and tagged."""
    with (
        planned_device(device.type, capability),
        own_workspace(workspace),
        tagged_workspace(tag),
    ):
        yield


def _made(one: FakeTensor, tensors: list[FakeTensor]) -> _Made:
    """How a tensor came out of these arguments."""
    for number, tensor in enumerate(tensors):
        if one is tensor:
            return _Made(number)
    storage = one.untyped_storage()._cdata
    owners = (n for n, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage)
    shape, stride = tuple(one.shape), one.stride()
    owner, offset = next(owners, None), int(one.storage_offset())
    return _Made(None, owner, shape, stride, offset, one.dtype, one.fake_device)


def _equal(one: FakeTensor, other: FakeTensor) -> bool:
    """Whether two tensors are the same for every operation."""

    def facts(tensor: FakeTensor) -> tuple[Any, ...]:
        return (
            *(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype),
            *(tensor.fake_device, tensor.untyped_storage().nbytes()),
            *(tensor.pytype, tensor.dispatch_keys, torch._C._dispatch_key_set(tensor)),
        )

    return facts(one) == facts(other)


@functools.cache
def _is_lasting(func: Any) -> bool:
    """Whether an operation on the same kinds of tensors always gives the same kinds.

    torch's own do unless they are tagged; of others it is known where they give nothing.
    """
    if not isinstance(func, OpOverload) or func in FakeTensorMode.lift_fns:
        return False
    own = func.namespace in ("aten", "prims") or not func._schema.returns
    return own and DEPENDS_ON_MORE.isdisjoint(func.tags)
