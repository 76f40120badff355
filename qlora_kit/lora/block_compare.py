"""Whether fused blocks give the numbers of a model's own layers: tried once on random input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.decoder import decoder_layers, settings_of
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.device.target import has_values
from qlora_kit.lora.block import Block
from qlora_kit.lora.block_parts import OPTION

COMPARED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative; both sides do the same operations, a matmul of other width may round otherwise."""


def fused_blocks(model: PreTrainedModel) -> list[Block] | str:
    """The blocks of the decoder layers of `model`, or why they stay as they are."""
    layers, blocks, compared = decoder_layers(model), [], set()
    name = type(layers[0]).__name__
    if not architecture_of(model.config.model_type).known:
        return f"{name} stays as it is: its family has no record, so none of its parts is fused"
    for layer in layers:
        block = Block.of(layer)
        if block is None:
            return f"{name} stays as it is: its parts are not those of a known block"
        blocks.append(block)
    for layer, block in zip(layers, blocks, strict=True):
        # Also the forwards that were put on modules, in place of their classes' own.
        own = tuple(vars(module).get("forward") for module in layer.modules())
        kind = (settings_of(layer), own, block.kind)
        if kind not in compared:
            compared.add(kind)
            # Not `>`: NaN is no agreement.
            if not (error := _difference(model, layer, block)) <= TOLERANCE[computed_in(model)]:
                return f"{name} stays as it is: ours differs by {error:.1e} on random input"
    return blocks


def _difference(model: PreTrainedModel, layer: Any, block: Block) -> float:
    """The largest difference of both outputs, relative to the largest output."""
    embeddings = model.get_input_embeddings().weight
    if not has_values(embeddings):
        return 0.0  # a plan has no numbers to compare; the run does it
    device, dtype = model.device, computed_in(model)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(1, COMPARED_TOKENS, embeddings.shape[1], generator=drawn).to(device, dtype)
    positions = torch.arange(COMPARED_TOKENS, device=device).unsqueeze(0)
    kind = getattr(block.attention, "layer_type", None)
    kind = kind or getattr(block.attention, "attention_type", None)
    rotary = model.base_model.rotary_emb
    options, shared = {"position_ids": positions, "attention_mask": None}, {}
    if block.per_layer is not None:
        width = layer.per_layer_input_gate.out_features
        options["per_layer_input"] = torch.randn(1, COMPARED_TOKENS, width, generator=drawn).to(
            device, dtype
        )
    if block.shares.reads:
        shared[block.shares.kind] = _drawn_keys(block.attention, drawn, x)
    with torch.no_grad():
        try:
            embedded = None if rotary is None else rotary(x, positions)
        except TypeError:
            embedded = rotary(x, positions, kind)
        results = []
        for run in (layer, block.forward):
            keys = dict(shared)
            given = {**options, OPTION: keys} if block.shares.kind else options
            hidden = run(x, position_embeddings=embedded, **given)
            stored = keys[block.shares.kind] if block.shares.stores else ()
            results.append((hidden, *stored))
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max())
        for theirs, ours in zip(*results, strict=True)
    )


def _drawn_keys(attention: Any, drawn: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of another layer, (1, kv heads, T, d) each."""
    heads = attention.q_proj.out_features // attention.head_dim // attention.num_key_value_groups
    keys, values = torch.randn(2, 1, heads, like.shape[1], attention.head_dim, generator=drawn).to(
        like.device, like.dtype
    )
    return keys, values
