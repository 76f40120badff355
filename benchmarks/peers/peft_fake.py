"""The guide's PEFT step on fake tensors, traced as a plan traces ours.

The model is transformers', the adapters and `prepare_model_for_kbit_training` are PEFT's, the
linears' forward and backward are bitsandbytes' own `Linear4bit` and `MatMul4Bit`. Only what these
read is made by hand, for a quantized weight cannot be made of fake tensors: packed bytes, and a
state of nested scales. What they call is as on CUDA: `gemm_4bit` of many rows dequantizes and then
multiplies, each dequantizing is three kernels (scales, their offset, weights), and attention is the
flash kernel, which takes fewer heads of keys as they are. The model has the few layers of `cut`,
which stand for all as in a plan.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from peers import peft_guide
from qlora_kit.base.decoder import decoder_layers
from qlora_kit.device.target import Capability, planned_device, without_values
from qlora_kit.memory.counter import Interval, StorageCounter
from qlora_kit.memory.profiler import follow
from qlora_kit.plan.extrapolate import cut, extend, layers_of
from qlora_kit.plan.work import noted_work
from qlora_kit.training.attention import positions_unread

BLOCK, NESTED = 64, 256


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer around tensors without values."""

    support_avx512bf16_for_cpu = False

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        count = like.in_features * like.out_features
        weight: Any = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), False)
        second = types.SimpleNamespace(
            absmax=torch.empty(count // BLOCK // NESTED), code=torch.empty(256), blocksize=NESTED
        )
        weight.quant_state = types.SimpleNamespace(
            nested=True,
            shape=(like.out_features, like.in_features),
            absmax=torch.empty(count // BLOCK, dtype=torch.uint8),
            blocksize=BLOCK,
            quant_type="nf4",
            state2=second,
            offset=torch.empty(()),
            dtype=torch.bfloat16,
        )
        weight.bnb_quantized, weight.compress_statistics, weight.quant_type = True, True, "nf4"
        self.weight = weight
        self.register_parameter("bias", None)
        self.compute_dtype, self.compute_type_is_set = torch.bfloat16, True
        self.quant_state = weight.quant_state


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """A weight (out, in) in bf16, by the three kernels that bitsandbytes has on CUDA."""
    scales = torch.empty_like(state.absmax, dtype=torch.float32)
    without_values("dequantize", (state.absmax, state.state2.absmax), (scales,))
    without_values("dequantize", (scales,), (scales,))
    weight = torch.empty(state.shape, dtype=torch.bfloat16)
    without_values("dequantize", (packed, scales), (weight,))
    return weight


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, `MatMul4Bit` dequantizes, forward and backward, and then multiplies."""
    functions = bnb.autograd._functions

    def gemm_4bit(x: Tensor, packed: Tensor, shape: Any, *rest: Any, **nested: Any) -> Tensor:
        state = types.SimpleNamespace(
            shape=shape,
            absmax=nested["absmax_8bit"],
            state2=types.SimpleNamespace(absmax=rest[0]),
        )
        return nn.functional.linear(x, dequantized(packed, state))

    operations = types.SimpleNamespace(gemm_4bit=types.SimpleNamespace(default=gemm_4bit))
    library = _Replaced(torch, ops=_Replaced(torch.ops, bitsandbytes=operations))
    with (
        mock.patch.object(functions, "torch", library),
        mock.patch.object(functions.F, "dequantize_4bit", dequantized),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", flash),
    ):
        yield


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that CUDA takes without a mask, on what autocast makes of its arguments."""
    assert attn_mask is None
    parts = (x.to(torch.bfloat16) for x in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = attend(*parts, dropout_p, is_causal, scale=scale)[0]
    return output


class _Replaced:
    """An object with some attributes replaced."""

    def __init__(self, real: Any, **attributes: Any) -> None:
        self._real, self._attributes = real, attributes

    def __getattr__(self, name: str) -> Any:
        if name in self._attributes:
            return self._attributes[name]
        return getattr(self._real, name)


def traced(
    config: Path, rank: int, rows: int, length: int, level: str, capability: Capability
) -> tuple[list[Interval], list[Interval]]:
    """The intervals of the passes of a step through all layers, and those of its update."""
    described = AutoConfig.from_pretrained(config)
    parts = cut(["layer"] * described.num_hidden_layers)
    names = [f"model.layers.{number}" for number in range(described.num_hidden_layers)]
    described.num_hidden_layers = len(layers_of(parts))
    described.use_cache = False
    counter = StorageCounter(apart=())
    with FakeTensorMode(allow_non_fake_inputs=True), planned_device("cuda", capability):
        model, base = _model(described, rank, level)
        trained = [p for p in model.parameters() if p.requires_grad]
        ids = torch.empty(rows, length, dtype=torch.int64)
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        with counter, as_on_cuda(), positions_unread():
            # Twice: the first update makes the states.
            for _ in range(2):
                first = len(counter.intervals)
                with noted_work(counter), follow(base, counter):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(input_ids=ids, labels=ids).loss
                    loss.backward()
                    counter.at("step")
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    counter.at("")
    intervals = [one for one in counter.intervals[first:] if one.phase]
    passes = [one for one in intervals if one.phase != "step"]
    update = [one for one in intervals if one.phase == "step"]
    # The update is traced with few layers' adapters, and is for all.
    times = len(names) / described.num_hidden_layers
    for one in update:
        one.work = type(one.work)({work: round(n * times) for work, n in one.work.items()})
    return extend(passes, parts, names, ()), update


def _model(described: Any, rank: int, level: str) -> tuple[Any, Any]:
    """The model as the guide makes it ready, and the same without PEFT's cover."""
    base: Any = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    for layer in decoder_layers(base):
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, Linear4bit(linear))
    base.is_loaded_in_4bit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=level == "full",
            gradient_checkpointing_kwargs=peft_guide.REENTRANT,
        )
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        # Adapters are made where their layer is; `Module.to` takes no fake tensors (torch 2.13).
        move = "_move_adapter_to_device_of_base_layer"
        with (
            mock.patch.object(BaseTunerLayer, move),
            mock.patch.object(nn.Module, "to", lambda module, *where, **how: module),
        ):
            model: Any = get_peft_model(base, lora)
    model.train()
    return model, base
