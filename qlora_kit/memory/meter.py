"""What a real step takes, counted like a planned one.

`count_step` stands around the passes of one training step on the CPU, where every tensor can be
seen. On CUDA the caching allocator knows more than any count; `memory/measure.py` asks it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.base.load import tag_weights
from qlora_kit.base.quantize import tagged_workspace
from qlora_kit.data.batch import Batch
from qlora_kit.lora.inject import tag_adapters
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.memory.places import follow
from qlora_kit.training.optimizer import tag_states


@contextlib.contextmanager
def count_step(
    model: Any, optimizer: torch.optim.Optimizer, window: Sequence[Batch] = ()
) -> Iterator[StorageCounter]:
    """Inside, the counter sees a step of `model` come and go; what is there already is tagged.

    The batches of `window` count as activations.
    """
    counter = StorageCounter()
    tag_weights(model, counter.tag)
    tag_adapters(model, counter.tag)
    tag_states(optimizer, counter.tag)
    counter.tag("activations", batch_tensors(window))
    with tagged_workspace(counter.tag), counter, follow(model, counter):
        yield counter


def batch_tensors(window: Sequence[Batch]) -> list[Tensor]:
    """The tensors of some batches."""
    return [one for batch in window for one in batch.values() if isinstance(one, Tensor)]
