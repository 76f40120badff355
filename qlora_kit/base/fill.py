"""A built model filled with its weights: what `made.py` makes of its files, put in place.

Embeddings, norms and the output head are never widened: they are held in the compute dtype, or
where that is the wider one in the files' (`narrow.py`). A head that is quantized is multiplied tile
by tile (`head.py`), and shares no weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.embedding import host_component, move_to_host
from qlora_kit.base.head import QuantizedHead
from qlora_kit.base.in_fp32 import compute_in
from qlora_kit.base.layer_store import HostStore
from qlora_kit.base.linear import Quantize, QuantizedLinear, quantize_linear
from qlora_kit.base.made import names_on_host, tensors_of
from qlora_kit.base.meta_model import name_of_head
from qlora_kit.base.probe import check_forward
from qlora_kit.base.streamed_base import came, leaving, stream_layers
from qlora_kit.base.tensors import NumberChecks, Read, Tag, checks_later, untagged
from qlora_kit.config.training import ON_DEVICE, Placement


def fill(
    base: Base,
    read: Read,
    tag: Tag = untagged,
    quantize: Quantize = quantize_linear,
    placement: Placement = ON_DEVICE,
    in_files: bool = False,
) -> Any:
    """`base.model` frozen and in evaluation mode, every tensor in its place, as `read` gives it.

    A linear is quantized when its weight arrives. Nothing but `read` touches a file. A plan has a
    `quantize` of its own, and says whether layers come from the cache, `in_files`; it tries the
    model too, which without values refuses what cannot run.
    """
    model = base.model
    move_buffers(base, tag)
    checks = checks_later(torch.empty(0, dtype=base.dtype, device=base.device))
    hosted, away = names_on_host(base, placement), leaving(model, placement)
    for name, made in tensors_of(base, read, quantize, checks, hosted):
        put(model, name, made, tag, base.device if name in hosted else None, away, in_files)
    store_of = (lambda places: HostStore((), waits=True)) if in_files else None
    stream = functools.partial(stream_layers, device=base.device, tag=tag, store_of=store_of)
    return finished(base, checks, stream if placement.base_on_host else None)


def move_buffers(base: Base, tag: Tag) -> None:
    """What the architecture has computed when it was built comes to the device."""
    for name, buffer in list(base.model.named_buffers()):
        place(base.model, name, moved := buffer.to(base.device))
        tag("weights_other", (moved,))


def put(
    model: Any,
    name: str,
    made: Tensor | QuantizedLinear,
    tag: Tag,
    device: torch.device | None = None,
    away: str | None = None,
    in_files: bool = False,
) -> None:
    """Put a tensor, or a quantized linear, where the architecture has it.

    With a `device` it is an embedding that stays on the host, and sends its rows there. What has a
    name that begins with `away` goes to the host, or is `in_files`, to be streamed from there.
    """
    if isinstance(made, QuantizedLinear):
        is_head = model.get_submodule(name) is model.get_output_embeddings()
        _replace(model, name, QuantizedHead(made) if is_head else made)
    elif device is not None:
        weight = made.cpu()
        move_to_host(model.get_submodule(name.removesuffix(".weight")), weight, device)
        tag(host_component(weight, device), (weight,))
        return
    else:
        place(model, name, made)
    came(model, name, made, tag, away, in_files)


def finished(
    base: Base,
    checks: NumberChecks | None = None,
    stream: Callable[[Any], None] | None = None,
) -> Any:
    """The model of a base, all tensors in their places: tied, frozen and in evaluation mode.

    `stream` has its layers streamed. Errors: those of `checks` and of `stream`; `ModelError` of
    what cannot run.
    """
    model: Any = base.model
    if isinstance(model.get_output_embeddings(), QuantizedHead):
        # What shared a weight with the head has it alone.
        model.all_tied_weights_keys.pop(f"{name_of_head(model)}.weight", None)
    model.tie_weights(recompute_mapping=False)
    model.requires_grad_(False)
    compute_in(base.dtype, model)
    if checks is not None:
        checks.read()
    if stream is not None:
        stream(model)
    model.eval()
    check_forward(model)
    return model


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
