"""The loss of pairs of answers, of which one is preferred to the other: DPO and IPO.

A model is to give the chosen answer of each pair more than the reference gives it, and the rejected
one less. With the log-ratio r = log p(answer) - log p_reference(answer), summed over the tokens of
an answer, and s the share of pairs that are taken to be labelled the wrong way:

- sigmoid (Rafailov et al., 2023, arXiv:2305.18290): d = r(chosen) - r(rejected),
  -(1 - s) log sigma(beta d) - s log sigma(-beta d)
- ipo (Azar et al., 2023, arXiv:2310.12036): r is divided by the answer's tokens, as the authors
  have it, and the loss is (d - 1 / (2 beta))^2

The log-probabilities of the reference are no part of a step: they are computed once, and each batch
has those of its rows. Neither are logits: `cross_entropy_tokens` has a chunk of them at a time.

Left out: where pairs come from (`data/pairs.py`) and when references are computed
(`run/reference.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.base.decoder import in_mode
from qlora_kit.config.training import TrainingConfig
from qlora_kit.training.loss import SUPERVISED_TOKENS, Objective, to_device, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.batch import Batch


@dataclass(frozen=True)
class Preference(Objective):
    """The objective of batches of pairs, whose rows are chosen, rejected, chosen, rejected ...

    `margin` is beta d with the sums over tokens, `accuracy` the share of pairs in which it is above
    zero; the model as it begins has neither.
    """

    beta: float
    label_smoothing: float = 0.0
    kind: str = "sigmoid"
    measures: tuple[str, ...] = ("margin", "accuracy")
    pairs: bool = True

    def count(self, batch: Batch) -> int:
        """The pairs of a batch."""
        return len(batch["answered"]) // 2

    def sums(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Sums over the pairs of a batch of loss, margin and accuracy: (3,) in fp32."""
        ratios = log_probabilities(model, batch) - batch["reference"]
        chosen, rejected = ratios.view(-1, 2).unbind(1)
        margins = self.beta * (chosen - rejected)
        if self.kind == "ipo":
            tokens = ratios.new_tensor(batch["answered"])
            chosen, rejected = (ratios / tokens).view(-1, 2).unbind(1)
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        else:
            losses = -(1 - self.label_smoothing) * F.logsigmoid(margins)
            if self.label_smoothing:
                losses = losses - self.label_smoothing * F.logsigmoid(-margins)
        margins = margins.detach()
        return torch.stack((losses.sum(), margins.sum(), (margins > 0).float().sum()))


def objective_of(training: TrainingConfig) -> Objective:
    """What the steps of a run make smaller."""
    if training.method == "sft":
        return SUPERVISED_TOKENS
    settled = training.settled()
    assert settled.beta is not None
    return Preference(settled.beta, settled.label_smoothing or 0.0, settled.dpo_loss or "sigmoid")


def log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The log-probability of the supervised tokens of each row of pairs: (B,) in fp32."""
    losses = token_losses(model, batch)
    # Not `index_add`, whose sums on CUDA come in any order. The host knows how many each row has.
    rows = torch.split(losses, batch["answered"])
    return -torch.stack([row.sum() for row in rows])


@torch.no_grad()
def reference_log_probabilities(
    model: PreTrainedModel, batches: Iterable[tuple[list[int], Batch]], num_rows: int
) -> Tensor:
    """The log-probability of each row as the model is now: (num_rows,) in fp32, on the host.

    `batches` come with the rows that each has. In evaluation mode; the mode is restored.
    """
    found = torch.full((num_rows,), float("nan"))
    with in_mode(model.modules(), training=False):
        for rows, batch in batches:
            found[rows] = log_probabilities(model, to_device(batch, model.device)).cpu()
    return found
