"""Tensors that two modules share: a checkpoint may hold one a second time, if it is the same."""

from __future__ import annotations

from operator import attrgetter

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.fp8_checkpoint import read_numbers
from qlora_kit.base.tensors import Read
from qlora_kit.errors import ModelError


def check_tied(base: Base, read: Read) -> None:
    """Refuse a second copy that is another tensor. Errors: `ModelError`."""
    entries, scaled = base.entries, base.form.scaled
    for name, shared in base.tied.items():
        if name not in entries:
            continue
        own = {name: entries[name]}
        for _, tensor in read_numbers(own, scaled, base.dtype, base.device, read):
            kept = attrgetter(shared)(base.model)[: len(tensor)]
            if not torch.equal(tensor.to(kept.device, base.dtype), kept):
                raise ModelError(
                    f"{entries[name].path}: {name} differs from {shared}, to which config.json "
                    "ties it",
                    "set tie_word_embeddings to false in config.json, or fetch the model again",
                )
