"""Which rows of a model may be computed together, so that each gets what it would get alone.

- Attention: all of them. A mask hides padding.
- Convolutions and recurrences would read the padding of a prompt, or divide its tokens into other
  chunks: prompts of one length alone share a forward. A step of one token has no padding, and what
  it reads is the state of its own row.
- Rotary embeddings that depend on how long a text is are chosen by transformers for a batch as a
  whole, by its longest row. "longrope" has two sets of frequencies, one for texts within the length
  that the model was first trained for: rows on one side of it share a batch, and a row that crosses
  it is computed again from its first token, because its keys were turned by the other set.
  "dynamic" has frequencies for each length, and remembers the longest text that it saw: rows of one
  length share a batch, and it starts anew in each forward.
"""

from __future__ import annotations

import bisect
import contextlib
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
        self._dynamic: list[Any] = []
        for module in model.modules():
            for kind, parameters in _rotary_kinds(module):
                if kind == "longrope":
                    self._limits.append(parameters["original_max_position_embeddings"])
                elif "dynamic" in kind:
                    self._dynamic.append(module)
        self._limits = sorted(set(self._limits))

    def of_prompts(self, tokens: int) -> Hashable:
        """Prompts for which this is equal may share a forward."""
        if self._carries_state or self._dynamic:
            return tokens
        return self._side(tokens)

    def of_steps(self, tokens: int) -> Hashable:
        """The same of rows in a step of one token, each by its tokens with that one."""
        if self._dynamic or (self._carries_state and not self._steps_read_their_row):
            return tokens
        return self._side(tokens)

    def is_computed_again(self, tokens: int) -> bool:
        """Whether a row that has so many tokens now starts from its first one."""
        return bool(self._limits) and self._side(tokens) != self._side(tokens - 1)

    def _side(self, tokens: int) -> int:
        return bisect.bisect_left(self._limits, tokens)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Inside, "dynamic" rotary embeddings remember no text; then they do again."""
        before = [(module, dict(vars(module)), dict(module._buffers)) for module in self._dynamic]
        for module in self._dynamic:
            for name in list(module._buffers):
                if name.endswith("original_inv_freq"):
                    prefix = name.removesuffix("original_inv_freq")
                    module._buffers[f"{prefix}inv_freq"] = module._buffers[name]
                    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        try:
            yield
        finally:
            for module, attributes, buffers in before:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


def _rotary_kinds(module: Any) -> Iterator[tuple[str, Any]]:
    """The kind of each rotary embedding of a module, and its parameters in the config."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield kinds, module.config.rope_parameters
    elif isinstance(kinds, dict):
        for layer_type, kind in kinds.items():
            yield kind, module.config.rope_parameters[layer_type]
