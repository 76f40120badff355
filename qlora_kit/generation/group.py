"""Rows that are decoded together: the cache they share, and one step after another.

After the prompt a step is one token a row. It reads nothing back to the host and, as the tokens
stay on the device, copies nothing up: whether there is padding the host knows from the prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import masking_utils

from qlora_kit.base.quantize import decoding
from qlora_kit.base.recurrence import state_carriers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def together(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows that share a batch: all, or those of one length where padding would be read.

    A mask hides padding from attention. What carries a state through it may be moved by a bias
    (LFM2's) or divides the tokens into other chunks than those of the prompt alone.
    """
    if not state_carriers(model):
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    return list(by_length.values())


class Group:
    """Rows of a batch that are decoded together, with what the next step takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[int],
        prompts: Sequence[Sequence[int]],
        pad_id: int,
    ) -> None:
        self.rows = rows
        self._model = model
        self._places = torch.tensor(rows).to(model.device)
        self._is_padded = len({len(prompts[row]) for row in rows}) > 1
        # (B, T) each
        self._input_ids, self._mask = _padded_left([prompts[i] for i in rows], pad_id, model.device)
        self._position_ids = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache: Any = None

    def logits(self) -> Tensor:
        """Those of the next token of each row, (B, V) in fp32."""
        with (
            decoding() if self._cache is not None else contextlib.nullcontext(),
            _known(self._is_padded),
        ):
            output = self._model(
                input_ids=self._input_ids,
                attention_mask=self._mask,
                position_ids=self._position_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()  # type: ignore[no-any-return]  # (B, 1, V) to (B, V)

    def feed(self, tokens: Tensor) -> None:
        """The token that each row goes on with, of `tokens` (rows of all groups,)."""
        self._input_ids = tokens.index_select(0, self._places)[:, None]  # (B, 1)
        # (B, T + step + 1): every key so far
        self._mask = torch.cat((self._mask, torch.ones_like(self._input_ids)), dim=-1)
        self._position_ids = self._position_ids[:, -1:] + 1


@contextlib.contextmanager
def _known(is_padded: bool) -> Iterator[None]:
    """Inside, transformers does not read a mask to see whether it hides anything (5.23)."""
    real = getattr(masking_utils, "fast_all", None)
    if real is None:
        yield
        return
    masking_utils.fast_all = lambda mask: not is_padded
    try:
        yield
    finally:
        masking_utils.fast_all = real


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts of at most T tokens, each row's tokens at its right end."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
