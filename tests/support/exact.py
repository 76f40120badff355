"""Adapter gradients from autograd in fp64, on the weights that a model multiplies by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from families import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import Linear8bit, QuantizedLinear, dequantize
from qlora_kit.lora.inject import lora_layers

Gradients = dict[str, list[Tensor]]


def adapter_gradients(model: Any) -> Gradients:
    """By A and B of each adapted layer."""
    return {
        name: [weight.grad for weight in layer.weights("default")]
        for name, layer in lora_layers(model).items()
    }


def exact_gradients(model: Any, loss: Callable[[Any], Tensor]) -> Gradients:
    """Those of `loss(reference)`, where the reference is transformers' model of the same base.

    The base counts as dequantized to the compute dtype (8-bit weights are never rounded), the
    adapters as rounded to it; dropout keeps what the layer's own keeps where it stands.
    """
    compute, exact = model.get_input_embeddings().weight.dtype, torch.float64
    reference = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=compute)
    reference.requires_grad_(False).to(exact).train()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            dense = dequantize(layer, exact if isinstance(layer, Linear8bit) else compute)
            linear = reference.get_submodule(name.removesuffix(".base_layer"))
            linear.weight.data = dense.double()
    leaves = {}
    for name, layer in lora_layers(model).items():
        a, b = (w.detach().to(compute).double().requires_grad_() for w in layer.weights("default"))
        leaves[name] = (a, b)

        def update(linear, inputs, y, layer=layer, a=a, b=b):
            (x,) = inputs
            mask = layer.lora_dropout["default"](torch.ones_like(x))
            return y + layer.scaling["default"] * F.linear(F.linear(x * mask, a), b)

        reference.get_submodule(name).register_forward_hook(update)
    loss(reference).backward()
    return {name: [leaf.grad for leaf in pair] for name, pair in leaves.items()}


def gradient_errors(found: Gradients, exact: Gradients) -> list[float]:
    """The relative distance of each tensor's gradient."""
    assert found.keys() == exact.keys()
    return [
        relative_error(ours, theirs)
        for name, pair in exact.items()
        for ours, theirs in zip(found[name], pair, strict=True)
    ]
