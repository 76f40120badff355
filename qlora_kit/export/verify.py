"""How far an export is from the model as trained, on the same tokens.

Both models give a distribution for every token of some rows; what is reported is the mean
Kullback-Leibler divergence (nats a token), the share of tokens whose likeliest next token agrees,
and the largest difference of a logit. The export is read back from disk for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.base import Base
from qlora_kit.base.decoder import hidden_states
from qlora_kit.base.load import load_base
from qlora_kit.data.batch import Batch, eval_batches, padding_id
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import NumericError
from qlora_kit.training.loss import to_device

TOKEN_LIMIT = 4096
"""Tokens that are compared; each needs the logits of both models."""
CHUNK_ROWS = 256
BATCH_SIZE = 8


@dataclass(frozen=True)
class Verification:
    """The distance of an export over `tokens` tokens."""

    kl: float
    top1_agreement: float
    max_logit_difference: float
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """For export.json."""
        return asdict(self)


def verify(trained: Any, exported: Any, batches: Iterable[Batch]) -> Verification:
    """Compare two models on the positions of `batches` that precede a token, padding left out.

    Both run in evaluation mode. KL is of the exported model's distribution from the trained one's.
    """
    trained.eval()
    exported.eval()
    kl, agreed, largest, tokens = 0.0, 0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            positions = _positions(batch)
            hidden = [
                _hidden(model, batch).index_select(0, positions.to(model.device))
                for model in (trained, exported)
            ]
            for start in range(0, positions.numel(), CHUNK_ROWS):
                ours, theirs = (
                    _logits(model, rows[start : start + CHUNK_ROWS])
                    for model, rows in zip((trained, exported), hidden, strict=True)
                )
                log_p, log_q = ours.log_softmax(1), theirs.log_softmax(1)
                kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
                largest = max(largest, float((ours - theirs).abs().max()))
            tokens += positions.numel()
            if tokens >= TOKEN_LIMIT:
                break
    # Rounding can leave a divergence of nothing a hair below zero.
    return Verification(max(0.0, kl / tokens), agreed / tokens, largest, tokens)


def verify_export(base: Base, directory: Path, dtype: str, rows: Sequence[Encoded]) -> Verification:
    """Compare the model that is read back from `directory` with that of `base` on some rows."""
    exported = load_base(str(directory), bits=16, dtype=dtype, device=str(base.device))
    batches = eval_batches(rows, BATCH_SIZE, padding_id(base.tokenizer))
    return verify(base.model, exported.model, batches)


def check_distance(kl: float, limit: float | None, closer: str) -> None:
    """Refuse an export that is too far from the model as trained. Errors: `NumericError`."""
    if math.isfinite(kl) and (limit is None or kl <= limit):
        return
    said = f"above --max_kl {limit:g}" if math.isfinite(kl) else "which is no number"
    raise NumericError(
        f"the export is {kl:.3g} nats a token from the model as trained, {said}; "
        "nothing was written",
        closer,
    )


def _positions(batch: Batch) -> Tensor:
    """Flat indices of the positions whose next token is one of the row's own."""
    length = batch["input_ids"].shape[1]
    rows = [
        torch.arange(count - 1) + index * length for index, count in enumerate(batch["lengths"])
    ]
    return torch.cat(rows)


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    moved = to_device(batch, model.device)
    hidden = hidden_states(model, moved["input_ids"], moved["position_ids"])
    return hidden.reshape(-1, hidden.shape[-1])


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """fp32 logits on the CPU, through the head, its factor and its soft cap."""
    config = model.config
    scale, softcap = architecture_of(config.model_type).logit_scale_and_softcap(config)
    logits: Tensor = model.get_output_embeddings()(rows).float() * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    return logits.cpu()
