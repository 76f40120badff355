"""The one override of a decoder layer's forward: its code x its recompute level.

A layer runs through its fused block (`lora/block.py`) or through the model's own code, and its
activations are kept for backward or recomputed (`recompute.py`). Both are chosen layer by layer,
and one object on the layer composes them; nothing else replaces a layer's forward.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.decoder import CACHE, decoder_layers, layers_path
from qlora_kit.base.recurrence import state_carriers
from qlora_kit.device.target import set_inside
from qlora_kit.kernels.rmsnorm import FrozenNorm, normalize
from qlora_kit.lora.block import Block
from qlora_kit.lora.block_compare import fused_blocks
from qlora_kit.lora.block_parts import SharedKeys, norm_of
from qlora_kit.training.offload import LayerOffload, Offload
from qlora_kit.training.recompute import recompute, recompute_halves

_OWN_CODE = contextvars.ContextVar("models_own_code", default=False)


@dataclass(frozen=True)
class LayerForward:
    """What a decoder layer is called as; `original` is the forward that it came with.

    `random` says that the layer draws from torch's own generator (a base with dropout in it). With
    an `offload` what it is recomputed from is on the host meanwhile; `ends` say whether it is the
    first or the last of those that recompute.
    """

    layer: nn.Module
    original: Callable[..., Any]
    block: Block | None = None
    level: str = "none"
    random: bool = False
    offload: Offload | None = None
    ends: tuple[bool, bool] = (False, False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the layer's own forward, `hidden_states` (B, T, h) to the next layer's.

        A call with a cache, as generation makes it, goes through the model's code.
        """
        run, block = self.original, self.block
        cached = options.get(CACHE) is not None
        if cached or _OWN_CODE.get():
            block = None
        elif block is not None and block.rotation != "none":
            block = None if options.get("position_embeddings") is None else block
        if block is not None:
            run, args, options = block.forward, args[:1], {**options, **self._named(args)}
            for unused in (CACHE, "use_cache"):
                options.pop(unused, None)
        if self.level == "none" or not (self.layer.training and torch.is_grad_enabled()):
            return run(*args, **options)
        offload = None if self.offload is None else LayerOffload(self.offload, *self.ends)
        if self.level == "selective" and block is not None:
            return recompute_halves(block, self.random, self.shares, offload, *args, **options)
        return recompute(run, self.level, self.random, self.shares, offload, *args, **options)

    def _named(self, args: Sequence[Any]) -> dict[str, Any]:
        """What a layer is called with by position, the hidden states left out, by name."""
        names = list(inspect.signature(self.original).parameters) if len(args) > 1 else []
        return dict(zip(names[1:], args[1:], strict=False))

    @functools.cached_property
    def shares(self) -> SharedKeys:
        """What the layer does with keys and values of other layers."""
        return SharedKeys.of(self.layer)


def use_fused_blocks(model: PreTrainedModel, tiled: bool = False) -> str | None:
    """Let the decoder layers of `model` run through `Block`; None, or why they stay as they are.

    `tiled` lets their MLPs go over tiles of tokens.
    """
    blocks = fused_blocks(model)
    if isinstance(blocks, str):
        return blocks
    for layer, block in zip(decoder_layers(model), blocks, strict=True):
        layer.forward = replace(_forward_of(layer), block=replace(block, tiled=tiled))
    _fuse_last_norm(model)
    return None


@dataclass(frozen=True)
class NormForward:
    """What the norm before the head is called as: it keeps its input, and no copies in fp32."""

    norm: FrozenNorm
    original: Callable[..., Any]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(B, T, h) to (B, T, h)."""
        if _OWN_CODE.get():
            return self.original(hidden_states)  # type: ignore[no-any-return]
        return normalize(self.norm, hidden_states)


def _fuse_last_norm(model: PreTrainedModel) -> None:
    """Let the norm behind the decoder layers keep the least, where it is one of ours."""
    owner = model.get_submodule(layers_path(model).rpartition(".")[0])
    last: Any = getattr(owner, "norm", None)
    if last is None or isinstance(last.forward, NormForward):
        return
    if (norm := norm_of(last)) is not None:
        last.forward = NormForward(norm, last.forward)


def set_recompute(model: PreTrainedModel, levels: str | Sequence[str]) -> None:
    """Set the decoder layers of `model` to `none`, `selective` or `full`, all or each to its own.

    Outputs are equal bit for bit, whatever the levels, and on the CPU gradients are too (what
    holds on CUDA is in `training/recompute.py`). In a layer of a hybrid that has no attention, of
    which `selective` would keep the results, it is `full`.
    """
    layers, hybrid = list(decoder_layers(model)), bool(state_carriers(model))
    chosen = [levels] * len(layers) if isinstance(levels, str) else list(levels)
    again = [place for place, level in enumerate(chosen) if level != "none"] or [0]
    for place, (layer, level) in enumerate(zip(layers, chosen, strict=True)):
        attends = not hybrid or any(hasattr(one, "is_causal") for one in layer.modules())
        level = "full" if level == "selective" and not attends else level
        dropouts = (one.p for one in layer.modules() if isinstance(one, nn.Dropout))
        random = any((getattr(model.config, "attention_dropout", 0), *dropouts))
        ends = place == again[0], place == again[-1]
        layer.forward = replace(_forward_of(layer), level=level, random=random, ends=ends)


def set_offload(model: PreTrainedModel, offload: Offload | None) -> None:
    """Let what layers of `model` are recomputed from lie on the host meanwhile, or (None) not."""
    for layer in decoder_layers(model):
        layer.forward = replace(_forward_of(layer), offload=offload)


def models_own_code() -> AbstractContextManager[None]:
    """Let every model run its own layers meanwhile, module by module, as hooks on them expect."""
    return set_inside(_OWN_CODE, True)


def _forward_of(layer: Any) -> LayerForward:
    forward = layer.forward
    return forward if isinstance(forward, LayerForward) else LayerForward(layer, forward)
