"""Laws of the memory plan: what it says of a run is what is counted of the run, byte for byte."""

from __future__ import annotations

import pytest
import torch
from families import save_checkpoint

from qlora_kit.base.load import open_base, read_weights
from qlora_kit.base.quantize import own_workspace
from qlora_kit.config import BaseConfig, LoRAConfig, TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.meter import count_step
from qlora_kit.memory.plan import COMPONENTS, plan_memory
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

LEVELS = ("none", "selective", "full")
SHAPE = {"num_hidden_layers": 6, "intermediate_size": 192, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A random Llama of six layers, deep enough to be extended."""
    directory = tmp_path_factory.mktemp("plan") / "base"
    save_checkpoint(directory, "llama3", torch.bfloat16, **SHAPE)
    return str(directory)


def batch_of(rows, length, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 260, (rows, length), generator=drawn).tolist()
    return collate([Encoded(row, row) for row in ids], 0)


def counted(base, lora, training, levels, rows, length, micro_steps=3):
    """The stretches of a real second step, the optimizer's at its end.

    Its workspace is one of its own: what other models left in this process is not counted.
    """
    with own_workspace({}):
        return _counted(base, lora, training, levels, rows, length, micro_steps)


def _counted(base, lora, training, levels, rows, length, micro_steps):
    model = inject_lora(read_weights(open_base(base)), lora, seed=training.seed)
    prepare_model(model, training, levels)
    optimizer = make_optimizer(training.optim, model.parameters(), 1e-3)
    model.train()

    def step(window, counter=None):
        def passes(gradients, window):
            loss = gradients(window)
            if counter is not None:
                counter.at("step")
                counter.filling = "optimizer"
            return loss

        train_step(model, window, optimizer, step=1, max_grad_norm=1.0, attempt=passes)

    window = [batch_of(rows, length, seed) for seed in range(micro_steps)]
    step(window)
    with count_step(model, optimizer, window=window) as counter:
        step(window, counter)
    return [one for one in counter.stretches if one.phase]


def sizes_of(stretches):
    most = {}
    for stretch in stretches:
        for name, size in stretch.largest.items():
            most[name] = max(most.get(name, 0), size)
    return most


def assert_equal(plan, stretches):
    """Planned equals counted: each component and the peak of each phase."""
    passes = [one for one in stretches if one.phase != "step"]
    peaks = {
        phase: max(one.peak for one in stretches if one.phase == phase)
        for phase in ("forward", "backward", "step")
    }
    assert {phase: plan.phases[phase] for phase in peaks} == peaks
    found = sizes_of(passes) | {"optimizer": passes[0].start["optimizer"]}
    for name in COMPONENTS:
        assert plan.bytes[name] == found.get(name, 0), name


POINTS = [
    (4, "none", 1, 128, "auto", "adamw"),
    (4, "selective", 4, 128, "all-linear", "paged_adamw_8bit"),
    (4, "full", 1, 128, "all-linear", "adamw"),
    (8, "none", 4, 128, "all-linear", "adamw"),
    (8, "selective", 1, 128, "auto", "adamw"),
    (8, "full", 4, 128, "auto", "paged_adamw_8bit"),
    (16, "none", 1, 128, "all-linear", "paged_adamw_8bit"),
    (16, "selective", 4, 128, "auto", "adamw"),
    (16, "full", 1, 128, "auto", "adamw"),
    (4, "none", 4, 256, "all-linear", "adamw"),
    (8, "selective", 1, 256, "all-linear", "paged_adamw_8bit"),
    (16, "full", 1, 256, "all-linear", "adamw"),
]


@pytest.mark.parametrize("model", ["tiny", "llama"])
@pytest.mark.parametrize(("bits", "level", "rows", "length", "targets", "optim"), POINTS)
def test_planned_equals_counted(base_dir, model, bits, level, rows, length, targets, optim):
    base = BaseConfig(
        "tiny" if model == "tiny" else base_dir, bits=bits, dtype="bf16", device="cpu"
    )
    lora = LoRAConfig(r=8, target_modules=targets, dropout=0.1 if rows == 1 else 0.0)
    training = TrainingConfig(
        optim=optim, gradient_checkpointing=level, batch_size=rows, gradient_accumulation_steps=3
    )
    stretches = counted(base, lora, training, level, rows, length)
    assert_equal(plan_memory(base, lora, training, length=length), stretches)
