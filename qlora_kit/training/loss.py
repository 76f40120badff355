"""The loss of a model over a batch's supervised tokens, for training and evaluation.

Only supervised positions reach the output head, in chunks (`kernels/cross_entropy.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.decoder import hidden_states, in_mode
from qlora_kit.base.embedding import ids_on_host
from qlora_kit.base.recurrence import check_packing
from qlora_kit.kernels.cross_entropy import cross_entropy_sum, cross_entropy_tokens
from qlora_kit.training.attention import within_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats, over `tokens` supervised tokens or pairs of rows that have so many.

    `measures` are means of what an objective measures beside its loss, by name.
    """

    loss: float
    tokens: int
    measures: Mapping[str, float] = field(default_factory=dict)


class Objective:
    """What a step makes smaller, the mean over all its micro-batches of a loss.

    This one is fine-tuning's: -log p of supervised tokens. `measures` names what is measured beside
    the loss, `pairs` says whether batches are of pairs.
    """

    measures: tuple[str, ...] = ()
    pairs: bool = False

    def count(self, batch: Batch) -> int:
        """Of how many things `sums` has the sum: here the supervised tokens of a batch."""
        return batch["num_supervised"]

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The sum of the loss, a scalar in fp32; with `measures` (1 + M,), the loss first."""
        return supervised_loss(model, batch)


SUPERVISED_TOKENS = Objective()


def supervised_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The sum (not the mean) over a batch's supervised tokens of -log p, a scalar in fp32.

    Errors: `ConfigError` for packs that the model's layers would not keep apart.
    """
    return cross_entropy_sum(*_predicting(model, batch))


def token_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What `supervised_loss` is the sum of: -log p of each supervised token, (N,) in fp32."""
    return cross_entropy_tokens(*_predicting(model, batch))


def _predicting(
    model: PreTrainedModel, batch: Batch
) -> tuple[Tensor, nn.Linear, Tensor, float | None, float]:
    """The hidden states (N, h) that predict, the head, their targets (N,), soft cap and scale."""
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
    return tokens, model.get_output_embeddings(), targets, softcap, scale


def evaluate(
    model: PreTrainedModel, batches: Iterable[Batch], objective: Objective = SUPERVISED_TOKENS
) -> Evaluation:
    """The mean loss over all batches, and what the objective measures beside it.

    Runs in evaluation mode and restores that of each module; draws no random number. The sum is
    read once, at the end.
    """
    device, tokens, count = model.device, 0, 0
    # Sums of many batches in double: a mean of batch means would weigh them wrong.
    total = torch.zeros(1 + len(objective.measures), dtype=torch.float64, device=device)
    with in_mode(model.modules(), training=False), torch.no_grad():
        for batch in batches:
            total += objective.sums(model, to_device(batch, device))
            tokens += batch["num_supervised"]
            count += objective.count(batch)
    loss, *measured = (one / count if count else float("nan") for one in total.tolist())
    return Evaluation(loss, tokens, dict(zip(objective.measures, measured, strict=True)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; its token ids are on the host as well."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key != "host_ids"
    }
    moved["host_ids"] = batch.get("host_ids", batch["input_ids"])
    return moved  # type: ignore[return-value]
