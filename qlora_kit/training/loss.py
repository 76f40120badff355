"""The loss of a model over a batch's supervised tokens, for training and evaluation.

Only supervised positions reach the output head, in chunks (`kernels/cross_entropy.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.decoder import hidden_states
from qlora_kit.base.embedding import ids_on_host
from qlora_kit.base.recurrence import check_packing
from qlora_kit.kernels.cross_entropy import cross_entropy_sum
from qlora_kit.training.attention import within_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over `tokens` supervised tokens."""

    loss: float
    tokens: int


def supervised_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The sum (not the mean) over a batch's supervised tokens of -log p, a scalar in fp32.

    Errors: `ConfigError` for packs that the model's layers would not keep apart.
    """
    if batch["packed"]:
        check_packing(model)
    ids, known = batch["input_ids"], batch.get("host_ids")
    with ids_on_host(ids, known), within_rows(model, batch) as rows:
        hidden = hidden_states(model, ids, batch["position_ids"], **rows)
    # (B, T, h) to (B * T, h), and of these the N supervised ones: (N, h).
    tokens = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch["supervised"])
    del hidden  # it is as large as these where every token is trained on
    # `supervised` points at the positions that predict; their targets are the next tokens, (N,).
    targets = batch["labels"].reshape(-1).index_select(0, batch["supervised"] + 1)
    config = model.config
    scale, softcap = architecture_of(config.model_type).logit_scale_and_softcap(config)
    return cross_entropy_sum(tokens, model.get_output_embeddings(), targets, softcap, scale)


def evaluate(model: PreTrainedModel, batches: Iterable[Batch]) -> Evaluation:
    """Minus the log-probability of all supervised tokens divided by their number.

    Runs in evaluation mode and restores the mode that was set; draws no random number. The sum is
    read once, at the end.
    """
    training = model.training
    model.eval()
    device, tokens = model.device, 0
    # Sums of many batches in double: a mean of batch means would weigh them wrong.
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with torch.no_grad():
            for batch in batches:
                total += supervised_loss(model, to_device(batch, device))
                tokens += batch["num_supervised"]
    finally:
        model.train(training)
    return Evaluation(float(total) / tokens if tokens else float("nan"), tokens)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; its token ids are on the host as well."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key != "host_ids"
    }
    moved["host_ids"] = batch.get("host_ids", batch["input_ids"])
    return moved  # type: ignore[return-value]
