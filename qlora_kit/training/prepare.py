"""A model with adapters made ready for its steps, the same way for a run and for its plan."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from qlora_kit.base.probe import check_packs
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.device.found import prefer_flash
from qlora_kit.errors import ConfigError
from qlora_kit.kernels.triton_ops import allow_triton
from qlora_kit.training.attention import LIBRARY, set_packed_attention
from qlora_kit.training.gradients import keep_gradients_in
from qlora_kit.training.host_gradients import stop_waiting, wait_on_host
from qlora_kit.training.layer_forward import set_offload, set_recompute, use_fused_blocks
from qlora_kit.training.offload import Offload


def prepare_model(
    model: PreTrainedModel,
    config: TrainingConfig,
    recompute: str | Sequence[str],
    packing: bool = False,
    placement: Placement = ON_DEVICE,
) -> str | None:
    """Choose attention, code and recompute of the layers; None, or why no blocks are fused.

    Errors: `ConfigError` where `packing` is asked of a model that does not keep rows apart, or
    tiles of MLPs that are no block's.
    """
    allow_triton(config.triton_kernels)
    keep_gradients_in(config.gradient_dtype, model.parameters())
    prefer_flash(model.device)
    set_packed_attention(model)
    if packing:
        check_packs(model)
    note = use_fused_blocks(model, placement.mlp_tiled) if config.fused_blocks else None
    if note is not None and placement.mlp_tiled:
        if config.tiled_mlp:
            raise ConfigError(f"tiled_mlp true: {note}", "leave --tiled_mlp out")
        note = f"{note}; its MLPs do not go over tiles"
    set_recompute(model, recompute)
    if placement.base_on_host:
        wait_on_host(model.parameters())
    set_offload(model, Offload() if placement.activations_on_host else None)
    return note


def restore_model(model: PreTrainedModel) -> None:
    """Give a model its own code and transformers' attention again, as other programs expect them.

    What `prepare_model` chose is gone, and so are matmuls in fp32 for a processor that has none of
    the model's dtype.
    """
    for module in model.modules():
        module.__dict__.pop("forward", None)  # ours lie in front of those of the class
    stop_waiting(model.parameters())
    keep_gradients_in("fp32", model.parameters())
    name = model.config._attn_implementation
    model.config._attn_implementation = LIBRARY.get(name, name)
