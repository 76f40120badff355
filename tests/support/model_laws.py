"""Laws that a model of any family obeys before it may train, each against transformers' own model.

The reference is transformers' model of the same checkpoint, with the weights that ours multiplies
by: a quantized linear counts as dequantized. Errors are relative, of fp32 models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from families import VOCABULARY, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.base.linear import Linear8bit, QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora, lora_layers
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.prepare import prepare_model

TOLERANCE = 1e-5
"""Of fp32: the two sides sum in another order."""
LENGTHS = (16, 48, 32)
"""Longer than the windows and chunks of the tiny models, and no padding where a row is alone."""
Found = dict[str, Tensor]


def rows() -> list[Encoded]:
    """Rows of random tokens, each with a prompt that is not trained on."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        made.append(Encoded(ids, [-100] * (length // 4) + ids[length // 4 :]))
    return made


def adapted(directory: Path, bits: int, targets: str = "all-linear") -> Any:
    """The base in `directory` with random adapters, as a run has it before its first step."""
    base = load_base(str(directory), bits=bits, dtype="fp32", device="cpu")
    model = inject_lora(base.model, LoRAConfig(r=4, alpha=8, target_modules=targets), seed=1)
    draw = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data = torch.randn(weight.shape, generator=draw) * 0.1
    return model.train()


def reference_of(model: Any, directory: Path, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of `model`, its adapters added by hooks.

    The adapters are leaves of its graph: `reference.leaves` has A and B by the linear's name.
    """
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    reference.requires_grad_(False).to(dtype).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            exact = torch.float64 if isinstance(layer, Linear8bit) else torch.float32
            linear = same_module(reference, name.removesuffix(".base_layer"))
            linear.weight.data = dequantize(layer, exact).to(dtype)
    reference.leaves = {}
    for name, layer in lora_layers(model).items():
        a, b = (w.detach().to(dtype).requires_grad_() for w in layer.weights("default"))
        reference.leaves[name] = (a, b)

        def update(linear, inputs, y, a=a, b=b, scale=layer.scaling["default"]):
            (x,) = inputs
            return y + scale * F.linear(F.linear(x, a), b)

        same_module(reference, name).register_forward_hook(update)
    return reference


def same_module(model: Any, name: str) -> Any:
    """The module of transformers' model that ours calls `name`: a multimodal one nests its text."""
    rest = name.removeprefix("model.")
    known = dict(model.named_modules())
    return next(
        known[one]
        for one in (
            name,
            f"model.language_model.{rest}",
            f"model.text_model.{rest}",
            f"language_model.{name}",
        )
        if one in known
    )


def logits_error(model: Any, reference: Any) -> float:
    """How far the logits of a model are from those of transformers' model."""
    ids = torch.tensor([rows()[1].input_ids, rows()[1].input_ids[::-1]])
    training = model.training
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, use_cache=False).logits
        theirs = reference(input_ids=ids, use_cache=False).logits
    model.train(training)
    return relative_error(ours, theirs)


def logits_loss(model: Any, row: Encoded, left: int = 0) -> Tensor:
    """The loss of a row from all logits of a model's own forward, with padding on its left."""
    ids = torch.tensor([[0] * left + row.input_ids])
    labels = torch.tensor([[-100] * left + [-100, *row.labels[1:]]])
    options: dict[str, Any] = {"use_cache": False}
    if left:
        mask = torch.ones_like(ids)
        mask[:, :left] = 0
        options |= {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
    logits = model(input_ids=ids, **options).logits
    return F.cross_entropy(
        logits[0, :-1].double(), labels[0, 1:], ignore_index=-100, reduction="sum"
    )


def results_of(model: Any, batches: Sequence[Batch]) -> Found:
    """Loss and adapter gradients of a model over batches, as a step has them.

    An adapter that the loss does not reach has a gradient of zeros.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        loss = supervised_loss(model, batch)
        loss.backward()
        total = total + loss.detach()
    return {"loss": total, **_gradients(model)}


def reference_results(reference: Any) -> Found:
    """The same of transformers' model, row by row, from all its logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows():
        loss = logits_loss(reference, row)
        loss.backward()
        total = total + loss.detach()
    gradients = {
        f"{name}.lora_{part}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, pair in reference.leaves.items()
        for part, leaf in zip("AB", pair, strict=True)
    }
    return {"loss": total, **gradients}


def left_padded(model: Any) -> Found:
    """Loss and gradients with padding on the left of each row, and a mask over it."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows():
        loss = logits_loss(model, row, left=16)
        loss.backward()
        total = total + loss.detach()
    return {"loss": total, **_gradients(model)}


def _gradients(model: Any) -> Found:
    return {
        f"{name}.lora_{part}": torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, layer in lora_layers(model).items()
        for part, weight in zip("AB", layer.weights("default"), strict=True)
    }


def worst(found: Found, reference: Found, least: float = 1e-6) -> tuple[float, str]:
    """The largest relative error of loss and gradients, and whose it is.

    A gradient that is zero but for rounding is measured by the share `least` of the largest one.
    """
    assert found.keys() == reference.keys()
    largest = max(float(one.norm()) for name, one in reference.items() if name != "loss")
    assert 0 < largest < float("inf")
    errors = []
    for name, exact in reference.items():
        ours = found[name].double()
        norm = float(exact.double().norm())
        error = float((ours - exact.double()).norm()) / max(norm, least * largest)
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def untouched(reference: Found) -> list[str]:
    """The adapters that the loss does not reach: transformers gives them no gradient at all."""
    names = {name.rpartition(".")[0] for name in reference if name != "loss"}
    return sorted(
        name
        for name in names
        if not reference[f"{name}.lora_A"].any() and not reference[f"{name}.lora_B"].any()
    )


def gradient_error(model: Any, found: Found, directory: Path) -> tuple[float, str, str, float]:
    """How far a step's loss and gradients are from autograd's, at which tensor, and in which dtype.

    That is fp64, or fp32 where the family's own code does not run in fp64. The last is how far
    autograd in fp32 is from it, looked at only where the first is too far: a deep or badly
    conditioned model rounds by more.
    """
    try:
        exact = reference_results(reference_of(model, directory, torch.float64))
        dtype = "float64"
    except RuntimeError:
        exact = reference_results(reference_of(model, directory, torch.float32))
        dtype = "float32"
    error, tensor = worst(found, exact)
    rounding = 0.0
    if error > TOLERANCE and dtype == "float64":
        single = reference_results(reference_of(model, directory, torch.float32))
        rounding, _ = worst(single, exact)
    return error, tensor, dtype, rounding


def levels_differ(model: Any) -> list[str]:
    """The recompute levels whose loss and gradients are not the same bits as without any."""
    batch = [collate(rows(), 0)]
    set_recompute(model, "none")
    expected = results_of(model, batch)
    differ = []
    for level in ("selective", "full"):
        set_recompute(model, level)
        found = results_of(model, batch)
        if not all(torch.equal(found[name], expected[name]) for name in expected):
            differ.append(level)
    set_recompute(model, "none")
    return differ


def alone(model: Any) -> Found:
    """Loss and gradients of rows each by itself, without padding."""
    return results_of(model, [collate([row], 0) for row in rows()])


def left_padding_of_reference(reference: Any) -> tuple[float, str]:
    """The same of transformers' own model: some families do not take padding on the left."""
    return worst_loss({"loss": logits_sum(reference, 16)}, {"loss": logits_sum(reference, 0)})


def logits_sum(model: Any, left: int) -> Tensor:
    """The loss of all rows, each with so much padding on its left."""
    with torch.no_grad():
        return torch.stack([logits_loss(model, row, left) for row in rows()]).sum()


def worst_loss(found: Found, reference: Found) -> tuple[float, str]:
    """The relative error of a loss alone."""
    exact = reference["loss"].double()
    return float((found["loss"].double() - exact).abs() / exact.abs()), "loss"


def prepared(directory: Path, bits: int, targets: str = "all-linear") -> tuple[Any, str | None]:
    """`adapted`, made ready as a run does, and why its blocks are not fused."""
    model = adapted(directory, bits, targets)
    note = prepare_model(model, TrainingConfig(), "none")
    return model, note
