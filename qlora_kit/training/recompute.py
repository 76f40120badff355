"""The levels of recompute: which activations of a decoder layer are kept for backward.

Kept by a layer of ours at each level, for T tokens, hidden h, query width a (heads x head size) and
n heads, in 16 bits, in bytes:

    full        2Th                     the layer's input
    selective   4Th + 2Ta + 4Tn         and the middle residual, attention's output and statistics
    none        what `lora/block.py` lists

`full` runs the layer again in backward. `selective` runs its two halves again, each by itself and
without attention: the replay of attention's half ends before its output projection, that of the
MLP's before its last one, where no norm reads what these give. Our own forward of attention
(`kernels/attention.py`) has no statistics. The library's under a soft cap is not one kernel: it has
nothing to keep and is recomputed; so is that of a base with dropout of its own.

With a tiled MLP (`lora/tiles.py`) every level recomputes the MLP in backward, tile by tile, and
keeps its input alone: at `none` gate and up are not kept, and a replay at `full` or `selective`
ends before the tiles, so that nothing is computed a third time. Where a layer has an embedding of
its own behind the MLP (Gemma 4), a replay goes through the tiles.

A layer that runs through the model's own code keeps 2Th at `full`, and its input with attention's
output and statistics, 2Th + 2Ta + 4Tn, at `selective`.

What is kept may lie on the host until it is needed (`offload.py`).

Replays are torch's checkpoint, non-reentrant, stopped as soon as the last needed tensor is there.
On the CPU every level gives the same bits. On CUDA that can hold of outputs alone: the backward of
fused attention adds up in no fixed order (torch documents it as nondeterministic), so gradients may
differ in their last bits from one step to the next, at one level as at two.
Dropout of adapters is keyed, so nothing random has to be saved for the second run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_kit.kernels.attention import ATTEND_IN_BLOCKS, ATTEND_ROWS
from qlora_kit.kernels.attention_ops import ATTEND_BY_KERNEL
from qlora_kit.lora.block import Block
from qlora_kit.lora.block_parts import OPTION, SharedKeys
from qlora_kit.training.offload import Kept, LayerOffload, Replay, replay_of

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ATTEND_IN_BLOCKS,
    ATTEND_ROWS,
    ATTEND_BY_KERNEL,
}
"""The kernels whose results `selective` keeps."""


def recompute(
    run: Callable[..., Any],
    level: str,
    random: bool,
    shares: SharedKeys,
    offload: LayerOffload | None,
    *args: Any,
    **options: Any,
) -> Any:
    """`run(*args, **options)` of a layer, recomputed in backward: `full`, or but for attention.

    `random` says that it draws from torch's own generator. Where `offload` is given, the first of
    `args` and what attention gave are on the host meanwhile.
    """
    # Attention that is not run again does not draw either, and what follows it would draw others.
    keeps_attention = level == "selective" and not random
    replay = replay_of(offload)
    context = {"context_fn": partial(_kept_attention, replay)} if keeps_attention else {}
    again = replay.through(partial(_replayed(random), **context), args[0] if args else None)
    return shares.through(again, run, options.pop(OPTION, None), *args, **options)


def recompute_halves(
    block: Block,
    random: bool,
    shares: SharedKeys,
    offload: LayerOffload | None,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    per_layer_input: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`Block.forward` at `selective`, (B, T, h) to (B, T, h): each half recomputed by itself."""
    again = _replayed(random)
    replay = replay_of(offload, begins=False)
    # Around attention alone: such a context looks at every operation inside, in Python.
    keeping, kept = (nullcontext(), nullcontext()) if random else _kept_attention(replay)
    contexts, shared = [keeping], options.pop(OPTION, None)

    def attention_half(x: Tensor, **inside: Any) -> Tensor:
        around, given = (contexts.pop() if contexts else kept), {**options, **inside}
        return block.attention_half(x, position_embeddings, attention_mask, given, around)

    moved = replay.through(again, hidden_states)
    middle: Tensor = shares.through(moved, attention_half, shared, hidden_states)
    moved = replay_of(offload, ends=False).through(again, middle)
    result: Tensor = moved(block.mlp_half, middle, per_layer_input)
    return result


def _replayed(random: bool) -> Callable[..., Any]:
    """torch's checkpoint of a function and its arguments."""
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=random)


def _kept_attention(
    replay: Replay,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A context that keeps what attention's kernels give, and one that gives it back, in order."""
    kept: deque[Any] = deque()
    return _Keep(replay, kept), _Give(replay, kept)


class _Attention(TorchDispatchMode):
    """Looks at the calls of attention's kernels; `kept` has what each of them gave."""

    def __init__(self, replay: Replay, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._replay, self._kept = replay, kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in ATTENTION:
            return self.attend(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def attend(self, kernel: Callable[[], Any]) -> Any:
        """What such a kernel gives."""
        raise NotImplementedError

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's compiler is not asked to leave every operation alone, which takes its time.
        return False


class _Keep(_Attention):  # type: ignore[no-untyped-call]
    """Keeps what the kernels give."""

    def attend(self, kernel: Callable[[], Any]) -> Any:
        given = kernel()
        kept = (self._kept_of(one) for one in (given if type(given) is tuple else (given,)))
        self._kept.append(tuple(kept) if type(given) is tuple else next(kept))
        return given

    def _kept_of(self, one: Any) -> Any:
        """Outputs and statistics; other results are counts and states of generators."""
        if not isinstance(one, Tensor):
            return one
        return self._replay.keep(one) if one.is_floating_point() and one.numel() else one.detach()


class _Give(_Attention):  # type: ignore[no-untyped-call]
    """Gives it back in place of their calls."""

    def attend(self, kernel: Callable[[], Any]) -> Any:
        kept = self._kept.popleft()
        return tuple(map(self._given, kept)) if type(kept) is tuple else self._given(kept)

    def _given(self, kept: Any) -> Any:
        return self._replay.back(kept) if isinstance(kept, Kept) else kept
