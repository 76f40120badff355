"""Where Triton kernels are used, and the operations that launch them.

Each operation is one launch and writes into tensors that it is given, so nothing is made inside:
its fake does nothing, and a plan counts what its caller makes. Triton itself is imported at the
first launch; a plan for a card needs none. The kernels are in `triton_*.py` beside the torch code
that gives the same numbers (`rmsnorm.py`, `rotary.py`, `swiglu.py`, `base/quantize.py`), which runs
everywhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.device.target import capability, is_rocm

OLDEST = {torch.float16: (7, 5), torch.float32: (7, 5), torch.bfloat16: (8, 0)}
"""The least compute capability for each dtype; others are computed by torch."""
WIDEST_ROW = 16384
"""Numbers of a row that a norm holds in registers; wider ones are computed by torch."""

SCHEMAS = {
    "triton_dequantize": (
        "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, "
        "Tensor? nested_offset, str quant_type, *, Tensor(a!) out) -> ()"
    ),
    "triton_normalize": (
        "(Tensor x, Tensor? added, Tensor? weight, float eps, int style, *, Tensor(a!)? summed, "
        "Tensor(b!) y, Tensor(c!) scale) -> ()"
    ),
    "triton_normalize_again": (
        "(Tensor x, Tensor scale, Tensor? weight, int style, *, Tensor(a!) y) -> ()"
    ),
    "triton_normalize_backward": (
        "(Tensor grad, Tensor x, Tensor scale, Tensor? weight, int style, Tensor? residual, "
        "*, Tensor(a!) out) -> ()"
    ),
    "triton_rotate": (
        "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool neighbours, bool back, *, "
        "Tensor(a!) q_out, Tensor(b!)? k_out) -> ()"
    ),
    "triton_gate": "(Tensor gate, Tensor up, str activation, *, Tensor(a!) out) -> ()",
    "triton_gate_backward": (
        "(Tensor grad, Tensor gate, Tensor up, str activation, *, Tensor(a!) grad_gate, "
        "Tensor(b!) grad_up) -> ()"
    ),
}
"""Of the overload `out` of each: what it writes is named, and is not read (`plan/work.py`)."""

_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")  # type: ignore[no-untyped-call]  # as long as the process
_allowed = True


def allow_triton(allowed: bool) -> None:
    """Whether kernels may be used from here on, in all threads of this process."""
    global _allowed
    _allowed = allowed


def uses_triton(x: Tensor) -> bool:
    """Whether what is computed from `x`, or is planned to be, is computed by a Triton kernel."""
    if not _allowed or x.dtype not in OLDEST:
        return False
    card = capability(x)
    return card is not None and card >= OLDEST[x.dtype] and _works()


@functools.cache
def _works() -> bool:
    """Whether Triton compiles and launches here; where there is no card, that it would on one.

    It needs a C compiler beside itself, which it may not find. Our kernels were never tried on
    AMD's cards.
    """
    if not torch.cuda.is_available():
        return True
    if is_rocm() or importlib.util.find_spec("triton") is None:
        return False
    try:
        with unset_fake_temporarily(), torch.no_grad():
            numbers = torch.ones(1, 16, device="cuda")
            torch.ops.qlora_kit.triton_gate.out(
                numbers, numbers, "silu", out=torch.empty_like(numbers)
            )
            torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler or a driver has to say
        warnings.warn(f"no Triton kernels, torch's instead: {error}", stacklevel=2)
        return False
    return True


def _declare(name: str, schema: str) -> None:
    def run(*arguments: object, **written: object) -> None:
        _launches()[name](*arguments, **written)

    def fake(*arguments: object, **written: object) -> None:
        """Nothing is made."""

    _LIBRARY.define(f"{name}.out{schema}")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(f"{name}.out", run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"qlora_kit::{name}.out", fake, lib=_LIBRARY)


@functools.cache
def _launches() -> dict[str, Callable[..., None]]:
    # Here, so that nothing waits for Triton where no kernel is launched.
    from qlora_kit.kernels.triton_launch import LAUNCHES

    return LAUNCHES


for _name, _schema in SCHEMAS.items():
    _declare(_name, _schema)
