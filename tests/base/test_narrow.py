"""Laws of matrices held in the 16 bits of their files by a base that computes in fp32.

Every number is that of the same files widened to fp32, whose matrices are held in fp32.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from counted_steps import counted_step
from families import edit_weights, relative_error, save_checkpoint, token_ids
from micro_batches import micro_batches, trained

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import ON_DEVICE, Placement, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.target import processor_with
from qlora_kit.export.tensors import model_tensors
from qlora_kit.kernels.cross_entropy import cross_entropy_sum
from qlora_kit.kernels.matmul import PART, grad_input, linear
from qlora_kit.lora.inject import inject_lora
from qlora_kit.plan.plan import BatchShape, Planner
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

LORA = LoRAConfig(r=4, target_modules="all-linear")
ON_HOST = Placement(embedding_on_host=True)
CASES = {
    "plain": ("llama_bias", 4, 16, ON_DEVICE),
    "dense": ("llama_bias", 16, 16, ON_DEVICE),
    "tied": ("qwen2", 16, 16, ON_DEVICE),
    # Its embedding casts a factor, the root of the width, to the dtype of its weight.
    "scaled": ("gemma3", 4, 16, ON_DEVICE),
    "small_head": ("gemma3", 4, 8, ON_HOST),
    "per_layer": ("gemma4", 4, 16, ON_HOST),
    "eight": ("llama2", 8, 4, ON_DEVICE),
}


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """A family's checkpoint in a 16-bit dtype, and the same numbers in fp32; written once."""
    made = {}

    def written(family, dtype=torch.bfloat16):
        if (family, dtype) not in made:
            narrow, wide = (tmp_path_factory.mktemp(family) for _ in range(2))
            for directory in (narrow, wide):
                save_checkpoint(directory, family, dtype)
            edit_weights(wide, lambda all: all.update({n: t.float() for n, t in all.items()}))
            made[family, dtype] = str(narrow), str(wide)
        return made[family, dtype]

    return written


def config(directory, bits, head_bits=16, **options):
    options = {"dtype": "fp32", "device": "cpu", "base_cache": False, **options}
    return BaseConfig(directory, bits=bits, head_bits=head_bits, **options)


def a_step(base, placement):
    """A training step: logits before it, loss, gradients and adapters; and the base."""
    opened = open_base(base)
    model = read_weights(opened, placement=placement)
    with torch.no_grad():
        found = {"logits": model(input_ids=token_ids(), use_cache=False).logits}
    model = inject_lora(model, LORA, seed=5)
    prepare_model(model, TrainingConfig(), "selective", False, placement)
    optimizer = make_optimizer("adamw", model.parameters(), 1e-2)
    (batches,) = micro_batches(1)
    found["loss"], found["norm"] = train_step(
        model.train(), batches, optimizer, step=1, max_grad_norm=1.0
    )
    return opened, {**found, **trained(model)}


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_fp32(files_of, case):
    """Bit for bit: each weight is one part, so that no sum has another order."""
    family, bits, head_bits, placement = CASES[case]
    narrow, wide = files_of(family)
    ours, found = a_step(config(narrow, bits, head_bits), placement)
    theirs, expected = a_step(config(wide, bits, head_bits), placement)
    assert ours.narrow
    assert not theirs.narrow
    held = dict(ours.model.state_dict())
    for name in ours.narrow & held.keys():
        assert held[name].dtype in (torch.bfloat16, torch.uint8, torch.int8), name
    assert computed_in(ours.model) is computed_in(theirs.model) is torch.float32
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
    for mine, other in zip(model_tensors(ours), model_tensors(theirs), strict=True):
        assert mine.name == other.name
        assert torch.equal(mine.make().float(), other.make().float()), mine.name


def test_fp16_files_too(files_of):
    narrow, wide = files_of("llama2", torch.float16)
    both = [a_step(config(one, 16), ON_DEVICE) for one in (narrow, wide)]
    assert both[0][0].model.lm_head.weight.dtype is torch.float16
    assert all(torch.equal(one, both[1][1][name]) for name, one in both[0][1].items())


def test_a_matrix_that_somebody_trains_gets_its_gradient(files_of):
    """Frozen ones are multiplied without it, which would be training that does nothing."""
    gradients = []
    for one in files_of("llama2"):
        model = read_weights(open_base(config(one, 16)))
        weight = model.model.layers[0].self_attn.o_proj.weight
        weight.requires_grad_(True)
        model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
        gradients.append(weight.grad)
    assert gradients[0].dtype is torch.bfloat16
    assert relative_error(gradients[0], gradients[1]) < torch.finfo(torch.bfloat16).eps


def test_resized_rows_stay_in_fp32(tmp_path):
    """A new row is a mean, which 16 bits would round."""
    save_checkpoint(tmp_path, "llama2", torch.bfloat16, vocab_size=250)
    base = open_base(config(str(tmp_path), 4, resize_embeddings=True))
    assert " stay in fp32, " in base.left
    with processor_with():
        resized = open_base(config(str(tmp_path), 4, dtype="auto", resize_embeddings=True))
    assert not any("bf16" in note for note in resized.notes)
    model = read_weights(base)
    assert model.get_input_embeddings().weight.dtype is torch.float32
    assert model.get_output_embeddings().weight.dtype is torch.float32


@pytest.mark.parametrize("case", ["plain", "scaled", "per_layer"])
def test_it_is_copied_and_pickled(files_of, case):
    family, bits, head_bits, placement = CASES[case]
    model = read_weights(
        open_base(config(files_of(family)[0], bits, head_bits)), placement=placement
    )
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids = token_ids(1, 8)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert type(other.get_input_embeddings()) is type(model.get_input_embeddings())


def test_a_processor_without_bf16_is_told(files_of):
    narrow, wide = files_of("llama2")
    with processor_with():
        (note,) = open_base(config(narrow, 4, dtype="auto")).notes
        assert note.endswith("stay in bf16, and are computed with in fp32")
        assert open_base(config(wide, 4, dtype="auto")).notes == ()
    with processor_with(torch.bfloat16):
        assert open_base(config(narrow, 4)).notes == ()


@pytest.mark.parametrize("case", ["dense", "scaled", "per_layer", "small_head"])
def test_planned_equals_counted(files_of, case):
    family, bits, head_bits, placement = CASES[case]
    base = config(files_of(family)[0], bits, head_bits)
    training = TrainingConfig(
        optim="adamw", gradient_checkpointing="full", batch_size=2, gradient_accumulation_steps=2
    )
    batches = []
    for seed in (1, 2):
        rows = token_ids(2, 48, seed).tolist()
        batches.append(collate([Encoded(row, [-100, *row[1:]]) for row in rows], 0))
    plan = Planner(base, LORA, training).plan(BatchShape(2, 48, 48), placement=placement)
    intervals = counted_step(base, LORA, training, "full", batches, batches[0], placement)
    for phase in ("forward", "backward", "step"):
        peak = max(one.peak for one in intervals if one.phase == phase)
        assert plan.phases[phase] == peak, phase
    for name in ("weights_quantized", "weights_other", "activations", "workspace"):
        assert plan.bytes[name] == max(one.largest.get(name, 0) for one in intervals), name


def test_a_weight_of_several_parts_gives_the_sums_of_one():
    """By column no sum is cut; a gradient's sum over rows is, in fp32: a rounding a part."""
    drawn = torch.Generator().manual_seed(0)
    narrow = torch.randn(3000, 400, generator=drawn).bfloat16()
    assert narrow.numel() > PART
    wide, bias = narrow.float(), torch.randn(3000, generator=drawn)
    x = torch.randn(2, 7, 400, generator=drawn)
    exact = torch.nn.functional.linear(x, wide, bias)
    assert relative_error(linear(x, narrow, bias), exact) < 1e-6
    grad, total = torch.randn(2, 7, 3000, generator=drawn), torch.randn(2, 7, 400, generator=drawn)
    for before in (None, total):
        given = [None if before is None else before.clone() for _ in range(2)]
        ours, theirs = (grad_input(grad, w, g) for w, g in zip((narrow, wide), given, strict=True))
        assert relative_error(ours, theirs) < 1e-6
    heads = []
    for weight in (narrow, wide):
        head = torch.nn.Linear(400, 3000)
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
        tokens = x.reshape(-1, 400).clone().requires_grad_()
        loss = cross_entropy_sum(tokens, head, torch.arange(14))
        loss.backward()
        heads.append((loss.detach(), tokens.grad))
    for ours, theirs in zip(*heads, strict=True):
        assert relative_error(ours, theirs) < 1e-6
