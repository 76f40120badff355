"""How far an export is from the model as trained, on the same tokens.

Both models give a distribution for every token of some rows; what is reported is the mean
Kullback-Leibler divergence (nats a token), the share of tokens whose likeliest next token agrees,
and the largest difference of a logit. The export is read back from disk for it.

The logits are compared on the device of the trained model, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.base import Base
from qlora_kit.base.decoder import hidden_states
from qlora_kit.data.batch import Batch, eval_batches, padding_id
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import empty_cache, free_bytes
from qlora_kit.errors import NumericError, ResourceError
from qlora_kit.export.read_back import Way, read_back, ways
from qlora_kit.process.out_of_memory import is_out_of_memory
from qlora_kit.training.attention import within_rows
from qlora_kit.training.loss import to_device

TOKEN_LIMIT = 4096
"""Tokens that are compared; each needs the logits of both models."""
AT_ONCE = 2**23
"""Logits of each model at once: some five fp32 tensors of this size are there."""


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
    taken = list(_enough(batches))
    return _compare((trained, _outputs(trained, taken)), (exported, _outputs(exported, taken)))


def verify_export(
    base: Base, directory: Path, dtype: str, rows: Sequence[Encoded]
) -> tuple[Verification, Way]:
    """Compare the model that is read back from `directory` with that of `base` on some rows.

    Also gives the way that the export was read. Errors: `ResourceError` where no way has room.
    """
    # As few batches as can be: layer by layer each of them reads all files.
    made = eval_batches(rows, max(1, len(rows)), padding_id(base.tokenizer), TOKEN_LIMIT)
    batches, said = list(_enough(made)), ""
    empty_cache()  # of what the export was made with
    for way in ways(directory, dtype, base.device, free_bytes(base.device)):
        try:
            ours = _outputs(base.model, batches)
            with read_back(directory, dtype, way) as exported:
                theirs = _outputs(exported, batches)
                return _compare((base.model, ours), (exported, theirs)), way
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = f"{way}: {error}"
        # Here, not above: the exception held the frames, and they the tensors.
        empty_cache()
    raise ResourceError(
        f"out of memory while the export was compared with the model as trained ({said})",
        "nothing was written; give --verify FILE with a few short rows, or free memory of the host",
    )


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


def _enough(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The first batches, up to the one with which enough tokens are compared."""
    tokens = 0
    for batch in batches:
        yield batch
        tokens += _positions(batch).numel()
        if tokens >= TOKEN_LIMIT:
            return


def _outputs(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """What a model's decoder gives its head at the compared positions, (n, h) for each batch."""
    model.eval()
    with torch.no_grad():
        return [_hidden(model, batch) for batch in batches]


def _compare(trained: tuple[Any, list[Tensor]], exported: tuple[Any, list[Tensor]]) -> Verification:
    """The distance of two models from what their decoders gave, batch by batch."""
    (ours, hidden), (theirs, others) = trained, exported
    step = max(1, AT_ONCE // ours.get_output_embeddings().weight.shape[0])
    # On the device, where nothing waits for them: divergence, agreement, the largest difference.
    sums, tokens = torch.zeros(3, dtype=torch.float64, device=hidden[0].device), 0
    with torch.no_grad():
        for mine, other in zip(hidden, others, strict=True):
            tokens += len(mine)
            for start in range(0, len(mine), step):
                p = _logits(ours, mine[start : start + step])
                q = _logits(theirs, other[start : start + step]).to(p.device)
                sums[1] += (p.argmax(1) == q.argmax(1)).sum()
                sums[2] = torch.maximum(sums[2], (p - q).abs().max())
                log_p, log_q = p.log_softmax(1), q.log_softmax(1)
                sums[0] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
    kl, agreed, largest = sums.tolist()
    # Rounding can leave a divergence of nothing a hair below zero; no number stays none.
    return Verification(0.0 if kl < 0 else kl / tokens, agreed / tokens, largest, tokens)


def _positions(batch: Batch) -> Tensor:
    """Flat indices of the positions whose next token is one of the row's own."""
    length = batch["input_ids"].shape[1]
    rows = [
        torch.arange(count - 1) + index * length for index, count in enumerate(batch["lengths"])
    ]
    return torch.cat(rows)


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    device = model.get_input_embeddings().weight.device
    moved = to_device(batch, device)
    with within_rows(model, moved) as rows:
        hidden = hidden_states(model, moved["input_ids"], moved["position_ids"], **rows)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, _positions(batch).to(device))


def _logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """fp32 logits through the head, its factor and its soft cap."""
    config = model.config
    scale, softcap = architecture_of(config.model_type).logit_scale_and_softcap(config)
    logits: Tensor = model.get_output_embeddings()(rows).float() * scale
    return logits if softcap is None else (logits / softcap).tanh() * softcap
