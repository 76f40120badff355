"""Gradients of the fp32 masters, kept in fp32 or in bf16 between micro-batches.

In bf16 they take 2 bytes a parameter less for as long as a step's passes last, where its peak is.
Each is rounded to 8 bits when it comes, and so is each sum with those of the micro-batches before.
Nothing else is: the norm is summed in fp32, and clipping and the optimizer get fp32 gradients
again, some parameters at a time, or all would be there at once in the end.

torch's `Tensor.grad_dtype` lets a gradient differ from its parameter; older ones do not have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qlora_kit.device.target import DTYPES
from qlora_kit.errors import ConfigError

PIECE = 2**24
"""Elements that are fp32 again at once, more where a parameter has more."""


def keep_gradients_in(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Let backward leave gradients of the trained `parameters` in a dtype, by its short name.

    Errors: `ConfigError` where this torch has no gradients of another dtype than the parameter's.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if hasattr(Tensor, "grad_dtype"):
        for parameter in trained:
            parameter.grad_dtype = DTYPES[name]
    elif any(parameter.dtype is not DTYPES[name] for parameter in trained):
        raise ConfigError(
            f"gradient_dtype {name}: torch {torch.__version__} keeps gradients in the dtype of "
            "their parameters alone",
            "install the torch of constraints.txt, or leave --gradient_dtype out",
        )


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all of them together, a scalar in fp32."""
    if all(gradient.dtype is torch.float32 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clipped(
    trained: Sequence[nn.Parameter], max_grad_norm: float, grad_norm: Tensor
) -> Iterator[None]:
    """Gradients of norm `grad_norm` clipped to another one: each time that some are fp32.

    The caller steps the optimizer each time: once, or for each piece of those kept in bf16.
    """
    gradients = {
        parameter: parameter.grad
        for parameter in trained
        if parameter.grad is not None and parameter.grad.dtype is not parameter.dtype
    }
    if not gradients:
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, grad_norm)
        yield
        return
    # An optimizer steps the parameters that have a gradient, each by itself.
    for parameter in gradients:
        parameter.grad = None
    for piece in _pieces(list(gradients)):
        dtypes = [parameter.grad_dtype for parameter in piece]
        try:
            for parameter in piece:
                parameter.grad_dtype = parameter.dtype
                parameter.grad = gradients.pop(parameter).to(parameter.dtype)
            nn.utils.clip_grads_with_norm_(piece, max_grad_norm, grad_norm)
            yield
        finally:
            for parameter, dtype in zip(piece, dtypes, strict=True):
                parameter.grad, parameter.grad_dtype = None, dtype


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, about `PIECE` elements at a time."""
    piece: list[nn.Parameter] = []
    for parameter in parameters:
        if piece and sum(one.numel() for one in piece) + parameter.numel() > PIECE:
            yield piece
            piece = []
        piece.append(parameter)
    yield piece
