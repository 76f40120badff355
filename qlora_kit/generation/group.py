"""Rows that are decoded together: the cache they share, and one step after another.

Rows of different lengths end at the same place: padding is on the left, the mask hides it, and
`position_ids` count from each row's own first token. After the prompt a step is one token a row. It
reads nothing back to the host and, as the tokens stay on the device, copies nothing up: whether
there is padding the host knows from the lengths.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils

from qlora_kit.base.decoder import CACHE
from qlora_kit.base.packed_matmul import Copies, copying_into
from qlora_kit.base.quantize import decoding
from qlora_kit.device.target import known_inside, sent, set_inside
from qlora_kit.generation.cache import RowBytes, is_known, join, keep
from qlora_kit.generation.request import no_cache
from qlora_kit.generation.step_attention import attending_in_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HIDES_NOTHING: ContextVar[tuple[bool] | None] = ContextVar("hides_nothing", default=None)
"""Whether the mask of the rows that are computed hides nothing, where that is known."""


class Group:
    """Rows of a batch that are decoded together, with what the next step takes.

    `lengths` are the tokens of each row, those that the next step takes included. The prompt of one
    row may be computed `most` tokens at a time, each part against the cache of those before it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        most: int | None = None,
    ) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self._model = model
        # (B, T) each
        input_ids, mask = _padded_left(prompts, pad_id, model.device)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        most = most or input_ids.shape[1]
        both = (torch.split(one, most, dim=1) for one in (input_ids, position_ids))
        self._parts = deque(zip(*both, strict=True))
        self._input_ids, self._position_ids = self._parts.popleft()
        self._mask = mask[:, : self._input_ids.shape[1]]
        self._cache: Any = None

    @property
    def can_change(self) -> bool:
        """Whether rows may join and leave: the kind of cache is known."""
        return is_known(self._cache)

    @property
    def row_bytes(self) -> RowBytes | None:
        """What the cache of one row takes; asked of a group of one row and one token."""
        return RowBytes.of(self._cache)

    def logits(self, copies: Copies | None = None) -> Tensor | None:
        """Those of the next token of each row, (B, V) in fp32; a step reads and makes `copies`.

        None after a part of a prompt that is not its last.
        """
        is_step = self._cache is not None and self._input_ids.shape[1] == 1
        with (
            decoding() if is_step else contextlib.nullcontext(),
            attending_in_step() if is_step else contextlib.nullcontext(),
            copying_into(copies if is_step else None),
            set_inside(_HIDES_NOTHING, (min(self.lengths) == max(self.lengths),)),
        ):
            output = self._model(
                input_ids=self._input_ids,
                attention_mask=self._mask,
                position_ids=self._position_ids,
                use_cache=True,
                logits_to_keep=self._last(),
                **{CACHE: self._cache},
            )
        self._cache = getattr(output, CACHE, None)
        if self._cache is None:  # RecurrentGemma takes one, and does not give it back
            raise no_cache(self._model)
        if self._parts:
            self._input_ids, self._position_ids = self._parts.popleft()
            self._mask = torch.cat((self._mask, torch.ones_like(self._input_ids)), dim=-1)
            return None
        return output.logits[:, -1].float()  # type: ignore[no-any-return]  # (B, 1, V) to (B, V)

    def _last(self) -> int | Tensor:
        """The last position, as models take it.

        Of a prompt as an index, which copies it out. A slice of several rows is not contiguous, and
        torch (2.13) copies the head's weight for each of them then, 1.2 s for 8 rows on 32,000 x
        768.
        """
        width = self._input_ids.shape[1]
        return 1 if width == 1 else self._input_ids.new_full((1,), width - 1)

    def feed(self, tokens: Tensor) -> None:
        """The token (B,) that each row goes on with."""
        self._input_ids = tokens[:, None]  # (B, 1)
        # (B, T + 1): every key so far, and this one
        self._mask = torch.cat((self._mask, torch.ones_like(self._input_ids)), dim=-1)
        self._position_ids = self._position_ids[:, -1:] + 1
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, after `feed`; padding that all have is cut off."""
        self.lengths = [self.lengths[row] for row in rows]
        chosen, width = sent(rows, self._model.device), max(self.lengths)
        keep(self._cache, chosen, width - 1)
        self._input_ids = self._input_ids.index_select(0, chosen)
        self._mask = self._mask[:, -width:].index_select(0, chosen)
        self._position_ids = self._position_ids.index_select(0, chosen)

    def join(self, others: Sequence[Group]) -> None:
        """Take in the rows of other groups, behind its own, after each was fed.

        The others are of no use then. Where memory ends on the way this one is what it was.
        """
        groups = [self, *others]
        lengths = [length for group in groups for length in group.lengths]
        width = max(lengths)
        input_ids = torch.cat([group._input_ids for group in groups])
        padded = [functional.pad(one._mask, (width - one._mask.shape[1], 0)) for one in groups]
        mask = torch.cat(padded)
        position_ids = torch.cat([group._position_ids for group in groups])
        self._cache = join([group._cache for group in groups], width - 1)
        self.lengths, self._input_ids = lengths, input_ids
        self._mask, self._position_ids = mask, position_ids


if hasattr(masking_utils, "fast_all"):  # with which transformers (5.23) reads a mask
    masking_utils.fast_all = known_inside(_HIDES_NOTHING, masking_utils.fast_all)


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of prompts of at most T tokens, each row's tokens at its right end."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return sent(ids, device), sent(mask, device)
