"""Laws that hold on whatever device the tensors are: of quantized linears, and of whole steps.

The suite runs them on the CPU, `tests/cuda` on a card. References are computed on the CPU in fp32
or in double; the decoders are written from the published tables and share nothing with the package.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bf
import torch
from adapted import adapted_model
from counted_steps import counted_step
from families import token_ids
from model_laws import worst as worst_of
from torch import Tensor
from trained import trained_base

from qlora_kit.base.base import Base
from qlora_kit.base.linear import (
    QuantizedLinear,
    base_grad_input,
    base_matmul,
    dequantize,
    quantize_linear,
)
from qlora_kit.base.load import load_base
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.recurrence import state_carriers
from qlora_kit.commands.main import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import free_bytes, with_room
from qlora_kit.device.transfer import Copies
from qlora_kit.export.export import export_model
from qlora_kit.export.readers import verify_export
from qlora_kit.generation.decode import generate_ids
from qlora_kit.plan.plan_memory import plan_memory
from qlora_kit.training.layer_forward import set_offload, set_recompute, use_fused_blocks
from qlora_kit.training.loss import supervised_loss, to_device
from qlora_kit.training.offload import Offload
from qlora_kit.training.prepare import prepare_model

NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FP4_POSITIVE = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
FP4 = FP4_POSITIVE + [-value for value in FP4_POSITIVE]
TABLES = {"nf4": NF4, "fp4": FP4}

FORMATS = [
    Quantization(4, "nf4", True),
    Quantization(4, "nf4", False),
    Quantization(4, "fp4", True),
    Quantization(4, "fp4", False),
    Quantization(8),
]
SHAPES = [(64, 64), (64, 172), (48, 96), (5, 7), (1, 1), (130, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding inputs and results to the dtype costs, with head-room.
PRODUCT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}
ON_A_CARD = 2.0
"""Of a tolerance: a card's libraries cut sums into parts, which are added in the result's dtype."""
STEP_TOLERANCE = {"cpu": 1e-5, "cuda": 5e-5}
"""Of gradients in fp32: sums in another order, and on a card exp and tanh a few ulp away."""
LEVELS = ("none", "selective", "full")
LENGTHS = (20, 48, 33)
"""Longer than the windows of the tiny models, and than where long rotary embeddings begin."""
Found = dict[str, Tensor]


def random_weight(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """The same numbers on every device."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=drawn).to(device, dtype)


def decode(layer: Any, form: Quantization) -> Tensor:
    """The weight of a layer from its bytes in fp32, by hand."""
    out_features, in_features = layer.out_features, layer.in_features
    if form.bits == 8:
        return layer.weight.float() * (layer.row_absmax / 127).unsqueeze(1)
    numel, device = out_features * in_features, layer.weight.device
    packed = layer.weight.view(-1).long()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:numel]
    scales = layer.absmax
    if form.double_quant:
        coded = layer.nested_map[layer.absmax.long()]
        groups = torch.arange(coded.numel(), device=device) // 256
        scales = coded * layer.nested_absmax[groups] + layer.nested_offset
    values = torch.tensor(TABLES[form.quant_type], device=device)[codes]
    blocks = torch.arange(numel, device=device) // 64
    return (values * scales[blocks]).view(out_features, in_features)


def check_bytes(form: Quantization, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
    """Bytes, scales and maps are bitsandbytes' own."""
    weight = random_weight(shape, dtype, device=device)
    layer: Any = quantize_linear(weight, None, form)
    assert layer.weight.device == weight.device
    if form.bits == 8:
        rows, row_absmax, _ = bf.int8_vectorwise_quant(weight.half())
        assert torch.equal(layer.weight, rows)
        assert torch.equal(layer.row_absmax, row_absmax)
        return
    packed, state = bf.quantize_4bit(
        weight, blocksize=64, quant_type=form.quant_type, compress_statistics=form.double_quant
    )
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.absmax, state.absmax)
    if form.double_quant:
        assert torch.equal(layer.nested_absmax, state.state2.absmax)
        assert torch.equal(layer.nested_offset, state.offset)
        assert torch.equal(layer.nested_map, state.state2.code)


def check_dequantized(
    form: Quantization, shape: Sequence[int], dtype: torch.dtype, device: str
) -> None:
    """A dequantized weight is the table's entry times the scale, rounded once."""
    layer = quantize_linear(random_weight(shape, device=device), None, form)
    expected = decode(layer, form)
    # Half an ulp of the dtype, and two of fp32 for the order of the factors.
    ulp = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    ours = dequantize(layer, dtype)
    assert ours.dtype is dtype
    assert ours.device == expected.device
    difference = (ours.double() - expected.double()).abs()
    tiny = torch.finfo(dtype).smallest_normal  # below it fp16 has no relative precision
    assert torch.all(difference <= ulp * expected.double().abs() + ulp * tiny)


def check_products(
    form: Quantization, shape: Sequence[int], dtype: torch.dtype, bias: bool, device: str
) -> None:
    """A matmul and its gradient are those of double precision, in any number of bits."""
    weight = random_weight(shape, dtype, device=device)
    offset = random_weight(shape[:1], dtype, 1, device) if bias else None
    layer: Any
    if form.bits == 16:
        layer = torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype, device=device)
        layer.weight.data = weight
        if bias:
            layer.bias.data = offset
        dense = weight
    else:
        layer = quantize_linear(weight, offset, form)
        # 8-bit matmuls never round the weight; 4-bit ones multiply by it in the compute dtype.
        dense = decode(layer, form)
        dense = dense if form.bits == 8 else dense.to(dtype)
    x = random_weight((2, 3, shape[1]), dtype, 2, device)
    grad = random_weight((2, 3, shape[0]), dtype, 3, device)
    y = x.double() @ dense.double().t()
    y = y if offset is None else y + offset.double()
    dx = grad.double() @ dense.double()
    tolerance = PRODUCT_TOLERANCE[dtype] * (1.0 if device == "cpu" else ON_A_CARD)
    for ours, reference in ((base_matmul(layer, x), y), (base_grad_input(layer, grad), dx)):
        assert ours.dtype is dtype
        assert ours.shape == reference.shape
        error = (ours.double() - reference).norm() / reference.norm()
        assert error <= tolerance


def rows() -> list[Encoded]:
    """Rows of random tokens, each with a prompt that is not trained on."""
    made = []
    for length in LENGTHS:
        ids = token_ids(1, length, seed=length)[0].tolist()
        made.append(Encoded(ids, [-100] * (length // 4) + ids[length // 4 :]))
    return made


def alone() -> list[Batch]:
    return [collate([row], 0) for row in rows()]


def together() -> list[Batch]:
    return [collate(rows(), 0)]


def packed() -> list[Batch]:
    """Two packs beside each other, as long as each other."""
    first, second, third = rows()
    return [collate_packs([[first, third], [second]], 0)]


def ways_of(model: Any) -> dict[str, list[Batch]]:
    """The rows together in a batch; and in packs, where the model keeps them apart."""
    made = {"together": together()}
    return made if state_carriers(model) else made | {"packed": packed()}


def trains(family: str, bits: int, dtype: torch.dtype, device: str) -> Any:
    """A tiny model with random adapters on every linear, on a device, the same on each of them."""
    model = adapted_model(family, dtype, bits=bits, own=False, targets="all-linear")
    model = model.to(device)
    prepare_model(model, TrainingConfig(), "none")
    return model


def results_of(model: Any, batches: Sequence[Batch]) -> Found:
    """Loss and adapter gradients of a model over batches, on the CPU."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        loss = supervised_loss(model, to_device(batch, model.device))
        loss.backward()
        total = total + loss.detach().cpu()
    gradients = {
        name: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.detach().cpu()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"loss": total, **gradients}


worst = functools.partial(worst_of, least=1e-4)
"""As in the laws of models; kernels of a card leave more in a gradient that is zero otherwise."""


def check_step(family: str, bits: int, device: str, levels: Sequence[str] = LEVELS) -> None:
    """A step in fp32 is that of the CPU, at each level of recompute, padded and packed."""
    expected = results_of(trains(family, bits, torch.float32, "cpu"), alone())
    model, tolerance = trains(family, bits, torch.float32, device), STEP_TOLERANCE[device]
    for level in levels:
        set_recompute(model, level)
        for name, batches in ways_of(model).items():
            error, tensor = worst(results_of(model, batches), expected)
            assert error <= tolerance, (level, name, tensor)


def check_step_in_16_bits(
    family: str, bits: int, dtype: torch.dtype, device: str, levels: Sequence[str] = LEVELS
) -> None:
    """A step in 16 bits is about as far from fp32 as the CPU's is."""
    exact = results_of(trains(family, bits, torch.float32, "cpu"), alone())
    rounding, _ = worst(results_of(trains(family, bits, dtype, "cpu"), alone()), exact)
    model = trains(family, bits, dtype, device)
    for level in levels:
        set_recompute(model, level)
        for name, batches in ways_of(model).items():
            error, tensor = worst(results_of(model, batches), exact)
            assert error <= 3 * rounding, (level, name, tensor)


def check_replays_from_host(
    family: str, bits: int, device: str, copies: Callable[[], Copies | None] = lambda: None
) -> None:
    """Steps whose layers are replayed from the host are those of the CPU, one after another."""
    expected = results_of(trains(family, bits, torch.float32, "cpu"), alone())
    model, tolerance = trains(family, bits, torch.float32, device), STEP_TOLERANCE[device]
    set_offload(model, Offload(copies()))
    for level in LEVELS[1:]:
        set_recompute(model, level)
        for name, batches in (ways_of(model) | {"alone": alone()}).items():
            error, tensor = worst(results_of(model, batches), expected)
            assert error <= tolerance, (level, name, tensor)


def check_tiles(family: str, dtype: torch.dtype, device: str) -> None:
    """A step whose MLPs go over tiles, of 16 tokens if `TILE_TOKENS` says so, is one without.

    In fp32 and in 16 bits, where adapters of a group are computed together on CUDA.
    """
    model, limit = trains(family, 4, dtype, device), 4 * STEP_TOLERANCE[device]
    limit = limit if dtype is torch.float32 else 3e-2
    for level in LEVELS:
        set_recompute(model, level)
        for name, batches in ways_of(model).items():
            assert use_fused_blocks(model) is None
            expected = results_of(model, batches)
            assert use_fused_blocks(model, tiled=True) is None
            error, tensor = worst(results_of(model, batches), expected)
            assert error <= limit, (level, name, tensor)


def check_answers(directory: Path, bits: int, device: str) -> None:
    """The likeliest tokens are those of the CPU, in fp32, whatever rows are beside a row."""
    prompts, options = [[5, 6, 7], [9] * 12, [20, 21, 22, 23]], {"eos_ids": (), "pad_id": 0}

    def drawn(device: str, prompts: list[list[int]]) -> list[list[int | None]]:
        model = load_base(str(directory), bits=bits, dtype="fp32", device=device).model
        return list(generate_ids(model, prompts, max_new_tokens=12, **options))

    expected = drawn("cpu", prompts)
    assert drawn(device, prompts) == expected
    assert drawn(device, prompts[1:2]) == [[step[1]] for step in expected]


def check_export(directory: Path, folder: Path, bits: int, device: str) -> list[str]:
    """An export is as far from what was trained however it is read back; returns those ways."""
    save_into = folder / "out"
    base: Base = trained_base(directory, bits=bits, dtype="fp32", device=device)
    assert any(isinstance(one, QuantizedLinear) for one in base.model.modules()) == (bits < 16)
    export_model(base, save_into)
    size = (save_into / "model.safetensors").stat().st_size
    found, ways = [], []
    for free in (free_bytes(base.device), size, 0):
        with with_room(free):
            distance, way = verify_export(base, save_into, rows())
        found.append(distance)
        ways.append(str(way))
    assert all(one.kl <= 1e-6 and one.top1_agreement == 1 for one in found)
    assert all(one.max_logit_difference <= 1e-3 for one in found)
    return ways


def check_planned(directory: Path, bits: int, level: str, device: str, within: float) -> None:
    """What a step takes is what is planned for the device, and backward's workspace is seen."""
    base = BaseConfig(str(directory), bits=bits, dtype="bf16", device=device)
    lora, length = LoRAConfig(r=8, target_modules="all-linear"), 96
    training = TrainingConfig(
        optim="adamw",
        gradient_checkpointing=level,
        batch_size=4,
        gradient_accumulation_steps=2,
    )

    def batch() -> Batch:
        ids = [token_ids(1, length, seed=seed)[0].tolist() for seed in range(4)]
        return collate([Encoded(row, row) for row in ids], 0)

    intervals = counted_step(base, lora, training, level, [batch(), batch()], batch())
    planned = plan_memory(base, lora, training, length=length)
    for phase in ("forward", "backward"):
        found = [one for one in intervals if one.phase == phase]
        peak = max(one.peak for one in found)
        assert abs(planned.phases[phase] - peak) <= within * peak, phase
        # In backward, too, where autograd has a thread of its own on a card.
        assert max(one.largest.get("workspace", 0) for one in found) == planned.bytes["workspace"]


def check_way(base: Path, rows: Path, folder: Path, device: str) -> dict[str, Any]:
    """The way of the README: train, evaluate, answer, export; returns run.json."""
    adapter, on = str(folder / "adapter"), ["--model", str(base), "--device", device]

    def run(*arguments: str) -> None:
        assert main([*arguments, *on]) == 0, arguments

    run(
        "finetune", "--data", str(rows), "--output_dir", adapter, "--max_steps", "6",
        "--eval_fraction", "0.3", "--eval_steps", "3", "--save_steps", "3", "--batch_size", "2",
        "--gradient_accumulation_steps", "2", "--target_modules", "all-linear",
    )  # fmt: skip
    lines = (folder / "adapter" / "metrics.jsonl").read_text().splitlines()
    losses = [one["loss"] for one in map(json.loads, lines) if "loss" in one]
    assert len(losses) == 6
    assert all(0 < loss < 20 for loss in losses)
    run("evaluate", "--data", str(rows), "--adapter", adapter)
    run("generate", "--adapter", adapter, "--prompt", "count 3:", "--max_new_tokens", "5")
    run(
        "export", "--adapter", adapter, "--output_dir", str(folder / "merged"), "--max_kl", "0.1",
        "--verify", str(rows),
    )  # fmt: skip
    report = json.loads((folder / "merged" / "export.json").read_text())
    assert report["kl"] < 0.1
    return dict(json.loads((folder / "adapter" / "run.json").read_text()))
