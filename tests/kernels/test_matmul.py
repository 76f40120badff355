"""On a processor without 16-bit instructions: the same numbers, and no matmul in 16 bits."""

from __future__ import annotations

import pytest
import torch
from adapted import adapted_model
from families import relative_error, save_checkpoint, token_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import compute_dtype
from qlora_kit.device.target import NATIVE, planned_device, processor_with
from qlora_kit.kernels.matmul import (
    add_matmul,
    bmm_to_fp32,
    grad_input,
    linear,
    matmul,
    matmul_fp32,
)
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.profiler import count_step
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train_step
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

HALVES = (torch.bfloat16, torch.float16)
MATMULS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "matmul", "linear", "dot", "mv")
ATTENTION = ("flash_attention", "attention_math", "efficient_attention")
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place: both sides round one sum, made in another order."""


class In16Bits(TorchDispatchMode):
    """Names of the matmuls and attention kernels that were given 16-bit tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        given = [x for x in args if isinstance(x, torch.Tensor)]
        if name in MATMULS or any(part in name for part in ATTENTION):
            self.found += [name for x in given if x.dtype in HALVES]
        return func(*args, **(kwargs or {}))


def drawn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_matmuls_in_fp32_are_those_of_the_instructions_up_to_rounding(dtype):
    x, weight = drawn(3, 5, 48, dtype=dtype), drawn(40, 48, dtype=dtype, seed=1)
    grad, bias = drawn(3, 5, 40, dtype=dtype, seed=2), drawn(40, dtype=dtype, seed=3)
    total = drawn(3, 5, 48, dtype=dtype, seed=4)
    left, right = grad.view(15, 40), weight
    results = {}
    for native in (HALVES, ()):
        with processor_with(*native), In16Bits() as seen:
            summed = total.clone()
            added = total.clone().view(15, 48)
            add_matmul(added, left, right, 0.5)
            assert grad_input(grad, weight, summed) is summed
            results[native] = [
                linear(x, weight, bias),
                grad_input(grad, weight),
                matmul(left, right),
                summed,
                added,
            ]
        assert bool(seen.found) == bool(native)
    for ours, reference in zip(results[()], results[HALVES], strict=True):
        assert ours.dtype is dtype
        # fp16 and bf16 kernels may round sums of parts as well.
        assert relative_error(ours.float(), reference.float()) <= 2 * ROUNDING[dtype]


def loss_and_gradients(model, batch):
    model.train()
    model.zero_grad(set_to_none=True)
    loss = supervised_loss(model, batch)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def batches():
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (20, 9, 30)]
    encoded = [Encoded(ids, ids) for ids in rows]
    return [collate(encoded, 0), collate_packs([encoded[:2], encoded[2:]], 0)]


@pytest.mark.parametrize(
    ("family", "bits", "dtype", "level"),
    [
        ("llama3", 4, torch.bfloat16, "none"),
        ("llama_bias", 8, torch.float16, "selective"),
        ("qwen3", 16, torch.bfloat16, "full"),
        ("mistral", 8, torch.bfloat16, "selective"),
        ("gemma2", 4, torch.bfloat16, "none"),
    ],
)
def test_a_step_without_instructions_multiplies_nothing_in_16_bits(family, bits, dtype, level):
    """Forward, gradients, adapters, loss and attention, packed and not; near what they give."""
    found = {}
    for native in (HALVES, ()):
        with processor_with(*native):
            model = adapted_model(family, bits=bits, packed=True, targets="all-linear", dtype=dtype)
            set_recompute(model, level)
            with In16Bits() as seen:
                found[native] = [loss_and_gradients(model, batch) for batch in batches()]
        assert bool(seen.found) == bool(native), set(seen.found)
    for (loss, gradients), (expected, reference) in zip(found[()], found[HALVES], strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)
        for name, gradient in reference.items():
            # Each of a dozen roundings on the way may fall to the other side.
            assert relative_error(gradients[name], gradient) <= 24 * 2**-8, name


def test_a_dense_base_through_its_own_code_multiplies_nothing_in_16_bits(tmp_path):
    """Loaded without instructions, with blocks of transformers, trained and generating."""
    save_checkpoint(tmp_path / "base", "llama3", torch.bfloat16)
    base = BaseConfig(str(tmp_path / "base"), bits=16, dtype="bf16", device="cpu")
    with processor_with():
        model = inject_lora(read_weights(open_base(base)), LoRAConfig(r=4))
        prepare_model(model, TrainingConfig(fused_blocks=False), "none")
        with In16Bits() as seen:
            for batch in batches():
                _, gradients = loss_and_gradients(model, batch)
            model.eval().generate(token_ids(1, 5), max_new_tokens=2, do_sample=False)
    assert not seen.found
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize(("bits", "packed"), [(4, True), (8, False), (16, False)])
def test_the_plan_of_a_processor_without_instructions_is_what_is_counted(tmp_path, bits, packed):
    save_checkpoint(tmp_path / "base", "llama3", torch.bfloat16)
    base = BaseConfig(str(tmp_path / "base"), bits=bits, dtype="bf16", device="cpu")
    rows = [[Encoded([1] * n, [1] * n) for n in pack] for pack in ([40, 24], [64])]
    micro_batches = [collate_packs(rows if packed else [pack[-1:] for pack in rows[1:]] * 2, 0)]
    training = TrainingConfig(optim="adamw", batch_size=2, gradient_accumulation_steps=1)
    with processor_with(), own_workspace({}):
        planner = Planner(base, LoRAConfig(), training)
        planned = planner.plan(BatchShape(2, 64, 64, packed, 63), "none")
        model = inject_lora(read_weights(open_base(base)), LoRAConfig())
        prepare_model(model, training, "none")
        optimizer = make_optimizer("adamw", model.parameters(), 1e-3)
        model.train()
        train_step(model, micro_batches, optimizer, step=1, max_grad_norm=1.0)
        with count_step(model, optimizer, micro_batches=micro_batches) as counter:
            train_step(model, micro_batches, optimizer, step=2, max_grad_norm=1.0)
    peak = max(planned.phases[phase] for phase in ("forward", "backward", "step"))
    assert 0 <= peak - counter.peak <= (0.03 * peak if packed else 0)


def test_auto_takes_16_bits_where_the_processor_has_them():
    cpu = torch.device("cpu")
    with processor_with(torch.bfloat16):
        assert compute_dtype("auto", cpu) is torch.bfloat16
    with processor_with():
        assert compute_dtype("auto", cpu) is torch.float32
    assert (compute_dtype("auto", cpu) is torch.bfloat16) == (torch.bfloat16 in NATIVE)


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_products_in_16_bits_become_fp32_in_their_own_kernel_on_nvidias_cards_alone(
    monkeypatch, hip
):
    """torch 2.9 for ROCm: "gemm input type at::BFloat16 and output type float is not supported"."""

    class Overloads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.add(str(func))
            return func(*args, **(kwargs or {}))

    found = set()
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode(), planned_device("cuda", (8, 0)), Overloads():
        x = torch.empty(2, 16, 16, dtype=torch.bfloat16)
        product = matmul_fp32(x[0], x[1])
        bmm_to_fp32(x, x, torch.empty(2, 16, 16))
    assert product.dtype is torch.float32
    in_one = {"aten.mm.dtype", "aten.bmm.dtype_out"}
    assert found & in_one == (set() if hip else in_one)
