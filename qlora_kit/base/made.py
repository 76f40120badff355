"""What fills a base, as its files are read: tensors, and quantized linears.

Each tensor is read into one reused buffer on the device, checked for non-finite values, cast to the
dtype that it is held in, quantized where it belongs to a decoder layer's linear, and freed. What is
quantized is cast only where that rounds its numbers. Memory stays at the result, one tensor and its
buffer. A head that is quantized is made of its own weight, or of the embedding's, which it shares
in the files. An embedding that stays on the host never was on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.bnb_checkpoint import stored_layer
from qlora_kit.base.embedding import embeddings, movable_embeddings
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.head import HeadSource
from qlora_kit.base.linear import Quantize, QuantizedLinear, quantize_linear
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.recurrence import recurrent_parameters
from qlora_kit.base.tensors import CPU, NumberChecks, Read, check_finite, read_tensors
from qlora_kit.config.training import Placement
from qlora_kit.device.target import device_type, dtype_name, on_host


def tensors_of(
    base: Base,
    read: Read,
    quantize: Quantize = quantize_linear,
    checks: NumberChecks | None = None,
    hosted: Collection[str] = (),
) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """What fills a base, as it is read: tensors, and quantized linears, by their names.

    What is not finite is refused, at once or where `checks` are read. Nothing is kept here. The
    tensors named `hosted` are on the host.
    """
    linears, head = decoder_linears(base.model), HeadSource.of(base.model, base.quantization)
    form, dense = base.form, base.form.stored or base.quantization.bits == 16
    to_quantize = frozenset() if dense else linears.keys() - form.skipped
    recurrent = recurrent_parameters(base.model)
    kept = {
        name: held_in(base, name, entry.torch_dtype, recurrent)
        for name, entry in base.plain.items()
        if name.removesuffix(".weight") not in to_quantize and name not in form.scaled
        if head is None or name != head.weight
    }
    scratch = _Scratch(base.dtype, base.device)

    def made_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
        owner = name.removesuffix(".weight")
        if owner in to_quantize:
            yield owner, quantize(tensor, None, base.quantization, name=name, checks=checks)
            return
        with on_host() if name in hosted else contextlib.nullcontext():
            tensor = grown(base, name, tensor)
        if head is not None and name == head.made_of:
            there = _sent(tensor, scratch.held) if name in hosted else tensor
            yield head.name, quantize(there, None, head.quantization, name=name, checks=checks)
        if head is None or name != head.weight:
            yield name, tensor

    plain = {name: one for name, one in base.plain.items() if name not in hosted}
    for name in hosted:
        with on_host():
            own = {name: base.plain[name]}
            numbers = read_numbers(own, form.scaled, base.dtype, CPU, read, kept)
            tensor = next(one if key in kept else one.clone() for key, one in numbers)
        yield from made_of(name, tensor)
        del tensor
    numbers = read_numbers(plain, form.scaled, base.dtype, base.device, read, kept, checks)
    for name, tensor in numbers:
        stays = name in kept or name in form.scaled
        if not stays or name.removesuffix(".weight") in to_quantize:
            tensor = _rounded(base, name, tensor, scratch, checks)
        elif name not in kept:
            tensor = tensor.clone()
        yield from made_of(name, tensor)
    yield from _stored_linears(base, linears, read)


def names_on_host(base: Base, placement: Placement) -> frozenset[str]:
    """The tensors of a base that a placement leaves in the host's memory, by name."""
    if not placement.embedding_on_host:
        return frozenset()
    return frozenset(
        f"{name}.weight" for name in movable_embeddings(base.model, base.quantization.head_bits)
    )


def held_in(base: Base, name: str, stored: torch.dtype, recurrent: frozenset[str]) -> torch.dtype:
    """The dtype that a tensor of the files is held in: the run's, or its own.

    Its own is the fp32 of a recurrence, or the 16 bits of a matrix that loses nothing by them.
    """
    own = name in base.narrow or (stored is torch.float32 and name in recurrent)
    return stored if own else base.dtype


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


def _rounded(
    base: Base, name: str, tensor: Tensor, scratch: _Scratch, checks: NumberChecks | None
) -> Tensor:
    """A tensor that is to be quantized, cast to the base's dtype where that changes a number.

    Quantizing computes in fp32. The new rows of a resized head are means, which are rounded to the
    dtype of the others.
    """
    changes = torch.promote_types(tensor.dtype, base.dtype) is not base.dtype
    if not (changes or base.embedding_rows):
        return tensor
    if (cast := scratch.cast(tensor)) is not tensor:
        check_finite(cast, f"{name} in {dtype_name(base.dtype)}", checks=checks)
    return cast


def _sent(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the host on the device of `like`."""
    if device_type(like) == "cpu":
        return tensor
    return torch.empty_like(tensor, device=like.device).copy_(tensor)


def grown(base: Base, name: str, tensor: Tensor) -> Tensor:
    """A tensor with the rows that a base was resized to, where it has one for each token."""
    if not base.embedding_rows:
        return tensor
    model, owner = base.model, name.rpartition(".")[0]
    by_token = (*embeddings(model).values(), model.get_output_embeddings())
    if any(model.get_submodule(owner) is one for one in by_token):
        return _with_rows(tensor, base.embedding_rows)
    return tensor


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
