"""A built model filled with its weights: each tensor is read, checked, quantized and put in place.

Each tensor is read into one reused buffer on the device, checked for non-finite values, cast to the
compute dtype, quantized where it belongs to a decoder layer's linear, and freed. Memory stays at
the result, one tensor and its buffer. Embeddings, norms and the output head are held in the compute
dtype, never widened to fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.bnb_checkpoint import stored_layer
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.linear import Quantize, QuantizedLinear, frozen_linear, quantize_linear
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.number_checks import NumberChecks
from qlora_kit.base.probe import check_forward
from qlora_kit.base.recurrence import recurrent_parameters
from qlora_kit.base.tagged import tag_linear
from qlora_kit.base.tensors import Read, Tag, check_finite, checks_later, read_tensors, untagged
from qlora_kit.config.training import ON_DEVICE, Placement
from qlora_kit.device.target import device_type, dtype_name, is_native


def fill(
    base: Base,
    read: Read,
    tag: Tag = untagged,
    quantize: Quantize = quantize_linear,
    placement: Placement = ON_DEVICE,
) -> Any:
    """`base.model` frozen and in evaluation mode, every tensor in its place, as `read` gives it.

    A linear is quantized when its weight arrives. Nothing but `read` touches a file. A plan has a
    `quantize` of its own; it tries the model too, which without values refuses what cannot run.
    """
    model = base.model
    move_buffers(base, tag)
    checks = checks_later(torch.empty(0, dtype=base.dtype, device=base.device))
    for name, made in tensors_of(base, read, quantize, checks):
        put(model, name, made, tag)
    return finished(model, checks)


def move_buffers(base: Base, tag: Tag) -> None:
    """What the architecture has computed when it was built comes to the device."""
    for name, buffer in list(base.model.named_buffers()):
        place(base.model, name, moved := buffer.to(base.device))
        tag("weights_other", (moved,))


def tensors_of(
    base: Base,
    read: Read,
    quantize: Quantize = quantize_linear,
    checks: NumberChecks | None = None,
) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """What fills a base, as it is read: tensors, and quantized linears, by their names.

    What is not finite is refused, at once or where `checks` are read. Nothing is kept here.
    """
    model = base.model
    linears = decoder_linears(model)
    by_token = {model.get_input_embeddings(), model.get_output_embeddings()}
    by_token.add(getattr(model.base_model, "embed_tokens_per_layer", None))
    form, dense = base.form, base.form.stored or base.quantization.bits == 16
    to_quantize = frozenset() if dense else linears.keys() - form.skipped
    recurrent = recurrent_parameters(model)
    kept = {
        name: held_in(base, name, entry.torch_dtype, recurrent)
        for name, entry in base.plain.items()
        if name.removesuffix(".weight") not in to_quantize and name not in form.scaled
    }
    scratch = _Scratch(base.dtype, base.device)
    numbers = read_numbers(base.plain, form.scaled, base.dtype, base.device, read, kept, checks)
    for name, tensor in numbers:
        owner = name.removesuffix(".weight")
        if name in kept:
            moved = tensor
        elif owner not in to_quantize:
            moved = tensor.clone()
        elif (moved := scratch.cast(tensor)) is not tensor:
            check_finite(moved, f"{name} in {dtype_name(base.dtype)}", checks=checks)
        if owner in to_quantize:
            yield owner, quantize(moved, None, base.quantization, name=name, checks=checks)
        else:
            if base.embedding_rows and model.get_submodule(name.rpartition(".")[0]) in by_token:
                moved = _with_rows(moved, base.embedding_rows)
            yield name, moved
    yield from _stored_linears(base, linears, read)


def put(model: nn.Module, name: str, made: Tensor | QuantizedLinear, tag: Tag) -> None:
    """Put a tensor, or a quantized linear, where the architecture has it."""
    if isinstance(made, QuantizedLinear):
        _replace(model, name, made)
        tag_linear(made, tag)
    else:
        place(model, name, made)
        tag("weights_other", (made,))


def finished(model: Any, checks: NumberChecks | None = None) -> Any:
    """A model whose tensors are all in their places: tied, frozen and in evaluation mode.

    Errors: those of `checks`; `ModelError` of what cannot run.
    """
    model.tie_weights()
    model.requires_grad_(False)
    multiply_in_fp32(model)
    if checks is not None:
        checks.read()
    model.eval()
    check_forward(model)
    return model


def _stored_linears(
    base: Base, linears: Mapping[str, nn.Linear], read: Read
) -> Iterator[tuple[str, QuantizedLinear]]:
    """The linears that the files hold quantized already, with their bytes as they are."""
    for name, stored in base.form.stored.items():
        by_name = {entry.name: suffix for suffix, entry in stored.entries.items()}
        own = {entry.name: entry for entry in stored.entries.values()}
        # The reader reuses one buffer, so what is kept is copied out of it.
        parts = {by_name[key]: tensor.clone() for key, tensor in read_tensors(own, read)}
        yield name, stored_layer(linears[name], stored, base.quantization, parts, base.device)


def held_in(base: Base, name: str, stored: torch.dtype, recurrent: frozenset[str]) -> torch.dtype:
    """The dtype that a tensor of the files is held in: the run's, or its own fp32."""
    return stored if stored is torch.float32 and name in recurrent else base.dtype


def multiply_in_fp32(model: nn.Module) -> None:
    """Let the frozen dense linears of a model multiply in fp32 (`kernels/matmul.py`).

    Where the processor has instructions for their dtype they stay as they are.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
            continue
        if device_type(layer.weight) == "cpu" and not is_native(layer.weight.dtype):
            layer.forward = functools.partial(frozen_linear, layer)  # type: ignore[method-assign]


class _Scratch:
    """Casts tensors that are not kept, in one piece of memory that grows to the largest of them.

    Freed copies of many sizes between small quantized results would leave holes in the heap: the
    process of a 1.1 B model took 1.3 GiB more than the model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.held = torch.empty(0, dtype=dtype, device=device)

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype; itself where it is that already."""
        if tensor.dtype == self.held.dtype:
            return tensor
        if self.held.numel() < tensor.numel():
            self.held = self.held.new_empty(tensor.numel())
        return self.held[: tensor.numel()].view(tensor.shape).copy_(tensor)


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor of one row a token with so many rows, the new ones the mean of those it has."""
    # Piece by piece, for an embedding in float64 is four times itself; in float64, so that the
    # order of the additions does not show in the result.
    pieces = torch.split(tensor, 4096)
    total = torch.stack([piece.sum(0, dtype=torch.float64) for piece in pieces]).sum(0)
    grown = tensor.new_empty((rows, *tensor.shape[1:]))
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = (total / len(tensor)).to(tensor.dtype)
    return grown


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or a buffer where the architecture has it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_buffer = leaf in module._buffers
    setattr(module, leaf, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))


def _replace(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Swap a linear; a bias that was read before stays, one that comes later finds its place."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    layer.bias = getattr(parent, leaf).bias
    setattr(parent, leaf, layer)
