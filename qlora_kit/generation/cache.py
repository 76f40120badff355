"""The caches of rows that are decoded together: joined, cut to fewer rows, and measured.

transformers keeps for each layer the keys and values of all tokens so far, (B, heads, T, d), or of
the last ones of a window, or a state that does not grow. Rows of a batch end at the same place, so
a batch of fewer tokens is padded on the left, which the mask hides: zeros, and not what memory had,
because a hidden value is still multiplied by 0. A layer with a window has `cumulative_length`, the
tokens that it has seen, padding included: mask and window are counted from there.

Which kinds of layers these are is asked by their exact classes: rows whose cache is of another kind
are decoded alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from qlora_kit.process.out_of_memory import is_out_of_memory

_KEYS = {DynamicLayer, LinearAttentionAndFullAttentionLayer}
_WINDOWS = {DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer}
_STATES = {
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
_EMPTY = {getattr(cache_utils, "DummyLayer", None)}  # since 5.23
_KNOWN = {*_KEYS, *_WINDOWS, *_STATES, *_EMPTY}


def is_known(cache: Any) -> bool:
    """Whether rows may be put into a cache, and taken out of it."""
    return type(cache) is DynamicCache and all(type(layer) in _KNOWN for layer in cache.layers)


def join(caches: Sequence[Any], tokens: int) -> Any:
    """The first of the caches with the rows of all, of which the longest has so many `tokens`.

    The others are used up layer by layer, so that it takes little more than the whole. Where memory
    ends on the way the first is what it was.
    """
    whole, undone = caches[0], list[Callable[[], None]]()
    try:
        for place in range(len(whole.layers)):
            undone.append(_join_layer([cache.layers[place] for cache in caches], tokens))
    except BaseException:
        for undo in undone:
            undo()
        raise
    return whole


def _join_layer(layers: Sequence[Any], tokens: int) -> Callable[[], None]:
    """Put the rows of all into the first; what takes them out again, without any memory."""
    layer, names = layers[0], ("keys", "values")
    kept, joined = _kept(layer, tokens), list[Tensor]()
    before = rows = 0
    if kept is not None:
        rows, _, before, _ = layer.keys.shape
        for name in names:
            joined.append(torch.cat([_padded(getattr(one, name), kept) for one in layers]))
    states = []
    for name, number in _states(layer):
        parts = [getattr(one, name)[number] for one in layers]
        rows = len(parts[0])
        states.append((name, number, torch.cat(parts)))

    # Nothing takes memory from here on.
    seen = getattr(layer, "cumulative_length", 0)
    if kept is not None:
        for name, tensor in zip(names, joined, strict=True):
            setattr(layer, name, tensor)
            for one in layers[1:]:
                setattr(one, name, None)
        _count(layer, tokens)
    for name, number, tensor in states:
        getattr(layer, name)[number] = tensor

    def undo() -> None:
        if kept is not None:
            for name in names:
                setattr(layer, name, getattr(layer, name)[:rows, :, max(0, kept - before) :])
            _count(layer, seen)
        for name, number, tensor in states:
            getattr(layer, name)[number] = tensor[:rows]

    return undo


def keep(cache: Any, rows: Tensor, tokens: int) -> None:
    """Leave these rows (n,) of a cache, in their order, of which the longest has so many `tokens`.

    Where memory has ended they are moved within what the cache has.
    """
    for layer in cache.layers:
        kept = _kept(layer, tokens)
        if kept is not None:
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                # (B, heads, T, d) to (n, heads, kept, d)
                part = whole.narrow(-2, whole.shape[-2] - kept, kept)
                setattr(layer, name, _chosen(part, rows))
            _count(layer, tokens)
        for name, number in _states(layer):
            states = getattr(layer, name)
            states[number] = states[number].index_select(0, rows)


@dataclass(frozen=True)
class RowBytes:
    """Bytes of a row's cache: what does not grow, and what each token takes, up to a window."""

    fixed: int
    by_token: tuple[tuple[int, int | None], ...]
    """For each layer bytes a token, and how many tokens it keeps; None keeps all."""

    @classmethod
    def of(cls, cache: Any) -> RowBytes | None:
        """Read off a cache of one row and one token; None where its kind is not known."""
        if not is_known(cache):
            return None
        fixed, by_token = 0, []
        for layer in cache.layers:
            if _kept(layer, 1) is not None:
                window = layer.sliding_window - 1 if type(layer) in _WINDOWS else None
                by_token.append((layer.keys.nbytes + layer.values.nbytes, window))
            fixed += sum(getattr(layer, name)[number].nbytes for name, number in _states(layer))
        return cls(fixed, tuple(by_token))

    def at(self, tokens: int) -> int:
        """Bytes of a row in a batch whose longest row has so many tokens."""
        return self.fixed + sum(
            each * (tokens if window is None else min(tokens, window))
            for each, window in self.by_token
        )


def _kept(layer: Any, tokens: int) -> int | None:
    """How many keys a layer keeps of so many tokens; None where it has none at all."""
    if type(layer) in _STATES - _KEYS - _WINDOWS or not layer.is_initialized or layer.keys is None:
        return None
    return min(tokens, layer.sliding_window - 1) if type(layer) in _WINDOWS else tokens


def _chosen(whole: Tensor, rows: Tensor) -> Tensor:
    """These rows (n,), which ascend, of a tensor (B, ...)."""
    try:
        return whole.index_select(0, rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    places = rows.tolist()
    for place, row in enumerate(places):
        if place != row:
            whole[place].copy_(whole[row])
    return whole[: len(places)]


def _count(layer: Any, tokens: int) -> None:
    if type(layer) in _WINDOWS:
        layer.cumulative_length = tokens


def _padded(keys: Tensor, kept: int) -> Tensor:
    """(B, heads, T, d) to (B, heads, kept, d): zeros before, or without the first."""
    return functional.pad(keys, (0, 0, kept - keys.shape[-2], 0))


def _states(layer: Any) -> Iterator[tuple[str, int]]:
    """The states that a layer carries from token to token, by attribute and number."""
    if type(layer) in _STATES:
        for name in ("conv_states", "recurrent_states"):
            for number, state in getattr(layer, name).items():
                if state is not None:
                    yield name, number
