"""Which matrices are held in the 16 bits of their files by a base that computes in fp32.

Most processors do not multiply bf16, so that a run there computes in fp32. Embedding, output head
and linears that are not quantized would take twice the memory of the files so, and be the same
numbers: they stay as they are. Rows of an embedding are cast as they are looked up, and a matrix is
multiplied part by part through a workspace (`kernels/matmul.py`). On a GPU a base is held in the
dtype that it computes in.

Left out: norms, biases and all that is small; what a model's own code reads past a module's forward
(`recurrence.py`), which would meet another dtype there; embeddings that are resized, whose new rows
are means that 16 bits would round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_kit.base.embedding import embeddings
from qlora_kit.base.meta_model import name_of_head, tied_names
from qlora_kit.base.placed_embedding import gives_rows
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.recurrence import weights_read
from qlora_kit.base.safetensors_file import TensorEntry

HALVES = (torch.bfloat16, torch.float16)


def narrow_matrices(
    model: Any,
    entries: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    device: torch.device,
    held: Quantization,
    embedding_rows: int | None = None,
) -> frozenset[str]:
    """The names of such tensors among `entries`, in a run of `dtype` on `device`.

    The linears of `model` are `held` in so many bits, and `embedding_rows` is what its embedding is
    resized to. Those of linears that are quantized are among them: a `Base` leaves those out. What
    shares a tensor is one of them only together with all that it shares it with.
    """
    if device.type != "cpu" or dtype is not torch.float32:
        return frozenset()
    by_token = {f"{name}.weight" for name in embeddings(model)}
    head, read = f"{name_of_head(model)}.weight", weights_read(model)
    able = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (f"{name}.weight" in by_token and gives_rows(module))
        if name not in read
    }
    if embedding_rows is not None:
        able -= by_token | {head}
    for name, source in tied_names(model).items():
        # A head of few bits has a weight of its own.
        if not {name, source} <= able and not (name == head and held.head_bits < 16):
            able -= {name, source}
    return frozenset(name for name in able & entries.keys() if entries[name].torch_dtype in HALVES)
