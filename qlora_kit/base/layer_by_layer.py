"""A dense model whose decoder layers are in memory only while they run.

What is around the layers (embedding, head, norms, computed buffers) is read at once. The tensors of
a layer are read from the checked files when its forward begins, and dropped when it ends. So a
forward takes the memory of one layer, whatever the model's, and reads all files: it is for few and
large batches.

Left out: quantized layers, and backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.base import Base
from qlora_kit.base.decoder import layers_path
from qlora_kit.base.fill import place
from qlora_kit.base.in_fp32 import compute_in, multiply_in_fp32
from qlora_kit.base.made import held_in
from qlora_kit.base.recurrence import recurrent_parameters
from qlora_kit.base.tensors import Read, Reader, read_tensors


@contextlib.contextmanager
def layer_by_layer(base: Base) -> Iterator[PreTrainedModel]:
    """The model of an opened base of plain dense tensors, in evaluation mode, for forwards inside.

    Outside its layers have no weights. Errors: as `read_weights`.
    """
    assert base.quantization.bits == 16
    assert not base.form.scaled
    model, hooks = base.model, []
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    own = [f"{layers_path(model)}.{index}." for index in range(len(layers))]
    with Reader() as read, contextlib.ExitStack() as held:
        for name, buffer in list(model.named_buffers()):
            place(model, name, buffer.to(base.device))
        _read(base, [name for name in base.plain if not name.startswith(tuple(own))], read)
        model.tie_weights()
        model.requires_grad_(False)
        compute_in(base.dtype, model)
        for prefix, layer in zip(own, layers, strict=True):
            names = [name for name in base.plain if name.startswith(prefix)]
            empty = {name: attrgetter(name)(model) for name in names}

            def fill(layer: nn.Module, *_: Any, names: list[str] = names) -> None:
                _read(base, names, read)
                multiply_in_fp32(base.dtype, layer)

            def drop(*_: Any, empty: dict[str, Tensor] = empty) -> None:
                for name, tensor in empty.items():
                    place(model, name, tensor)

            hooks += [
                layer.register_forward_pre_hook(fill),
                layer.register_forward_hook(drop, always_call=True),
            ]
        for hook in hooks:
            held.callback(hook.remove)
        yield model.eval()


def layer_bytes(base: Base) -> tuple[int, int]:
    """Bytes of what is around the decoder layers of an opened base, and of the largest of them."""
    path, sizes = f"{layers_path(base.model)}.", dict[str, int]()
    for name, entry in base.plain.items():
        inside = name.startswith(path)
        key = name.removeprefix(path).partition(".")[0] if inside else ""
        sizes[key] = sizes.get(key, 0) + entry.end - entry.start
    around = sizes.pop("", 0)
    return around, max(sizes.values(), default=0)


def _read(base: Base, names: list[str], read: Read) -> None:
    """Put these tensors of the files in their places."""
    recurrent = recurrent_parameters(base.model)
    entries = {name: base.plain[name] for name in names}
    kept = {key: held_in(base, key, one.torch_dtype, recurrent) for key, one in entries.items()}
    for name, tensor in read_tensors(entries, read, device=base.device, kept=kept):
        place(base.model, name, tensor)
