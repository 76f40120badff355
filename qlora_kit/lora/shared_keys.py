"""Keys and values that later layers read in place of their own, through recomputation.

Gemma 3n and 4 hand a dictionary from layer to layer: the last layer of each kind before the sharing
ones stores its keys and values, (B, kv heads, T, d) each, and those read them. A layer that is
recomputed with that dictionary in its hands would read in backward whatever is in it by then, and
its checkpoint would hold, through the dictionary, the results of what it is the checkpoint of: a
circle that nothing frees where a step is given up. So what is recomputed takes keys and values as
arguments and gives them as results, and the dictionary stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn

OPTION = "shared_kv_states"
"""What transformers calls the dictionary; its keys are the layers' types."""


@dataclass(frozen=True)
class SharedKeys:
    """What a layer does with the entry of its `kind` in the dictionary: `reads` or `stores` it."""

    kind: str = ""
    reads: bool = False
    stores: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> SharedKeys:
        """As the layer's own attention says it; most families' layers do neither."""
        attention: Any = getattr(layer, "self_attn", None)
        if not hasattr(attention, "is_kv_shared_layer"):
            return cls()
        reads, stores = attention.is_kv_shared_layer, attention.store_full_length_kv
        return cls(attention.layer_type, reads, stores)

    def through(
        self,
        again: Callable[..., Any],
        run: Callable[..., Any],
        shared: MutableMapping[str, Any] | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """What `again`, torch's checkpoint, gives for `run(*args, shared, **options)`."""
        if shared is None:
            return again(run, *args, **options)
        keys = tuple(shared[self.kind]) if self.reads else ()

        def apart(*args: Any, **options: Any) -> Any:
            given, rest = args[: len(keys)], args[len(keys) :]
            inside: dict[str, Any] = {self.kind: given} if given else {}
            hidden = run(*rest, **{OPTION: inside}, **options)
            return (hidden, *inside[self.kind]) if self.stores else hidden

        results = again(apart, *keys, *args, **options)
        if not self.stores:
            return results
        hidden, *stored = results
        shared[self.kind] = tuple(stored)
        return hidden
