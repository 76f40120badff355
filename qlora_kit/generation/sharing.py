"""Which rows of a model may be computed together, so that each gets what it would get alone.

- Attention: all of them. A mask hides padding.
- Convolutions and recurrences would read the padding of a prompt, or divide its tokens into other
  chunks: prompts of one length alone share a forward. A step of one token has no padding, and what
  it reads is the state of its own row.
- Rotary embeddings of the kind "longrope" have two sets of frequencies, one for texts within the
  length that the model was first trained for. transformers takes one for a batch as a whole, by its
  longest row: rows on one side of that length share a batch, and a row that crosses it is computed
  again from its first token, because its keys were turned by the other set. (Those of the kind
  "dynamic" change beyond the model's context only, where nothing is decoded.)

Of the last two kinds a prompt is computed whole: its parts would be divided into other chunks, or
turned by the other set of frequencies.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

from qlora_kit.base.recurrence import state_carriers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sharing:
    """The rules of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._carries_state = bool(state_carriers(model))
        # The mask that such layers get in transformers (5.23): none in a step of one token.
        self._steps_read_their_row = any(
            hasattr(sys.modules.get(type(module).__module__), "create_recurrent_attention_mask")
            for module in model.modules()
        )
        self._limits: list[int] = []
        for module in model.modules():
            for kind, parameters in _rotary_kinds(module):
                if kind == "longrope":
                    self._limits.append(parameters["original_max_position_embeddings"])
        self._limits = sorted(set(self._limits))

    def of_prompts(self, tokens: int) -> Hashable:
        """Prompts for which this is equal may share a forward."""
        return tokens if self._carries_state else self._side(tokens)

    def of_steps(self, tokens: int) -> Hashable:
        """The same of rows in a step of one token, each by its tokens with that one."""
        apart = self._carries_state and not self._steps_read_their_row
        return tokens if apart else self._side(tokens)

    @property
    def takes_parts(self) -> bool:
        """Whether a prompt may be computed in parts, each against the cache of those before it."""
        return not (self._carries_state or self._limits)

    def is_computed_again(self, tokens: int) -> bool:
        """Whether a row that has so many tokens now starts from its first one."""
        return bool(self._limits) and self._side(tokens) != self._side(tokens - 1)

    def _side(self, tokens: int) -> int:
        return bisect.bisect_left(self._limits, tokens)


def _rotary_kinds(module: Any) -> Iterator[tuple[str, Any]]:
    """The kind of each rotary embedding of a module, and its parameters in the config."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield kinds, module.config.rope_parameters
    elif isinstance(kinds, dict):
        for layer_type, kind in kinds.items():
            yield kind, module.config.rope_parameters[layer_type]
