"""Laws of the profiler: a counted step is the same step, and each component is what is held."""

from __future__ import annotations

import pytest
import torch
from families import save_checkpoint
from micro_batches import micro_batches, trained

from qlora_kit.base.load import load_base
from qlora_kit.base.tagged import tag_weights
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.device.target import processor_with
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import COMPONENTS, adapter_bytes, optimizer_bytes, weight_bytes
from qlora_kit.memory.profiler import MemoryProfiler
from qlora_kit.plan.plan_memory import plan_memory
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiler") / "base"
    save_checkpoint(directory, intermediate_size=192)
    return str(directory)


def run(base_dir, optim, level, counted):
    """Four steps, of which some are counted; trained parameters, the profiler and what was held."""
    profiler, held = MemoryProfiler(CPU), {}
    with profiler.loading() as counter:
        counter.at("load")
        model = load_base(base_dir, bits=4, dtype="bf16").model
        tag_weights(model, counter.tag)
        counter.at("inject")
        inject_lora(model, LoRAConfig(r=8, dropout=0.1), seed=1)
    set_recompute(model, level)
    optimizer = make_optimizer(optim, model.parameters(), 1e-2)

    def run_backward(backward, micro_batches):
        if len(done) in counted:
            profiler.begin(model, optimizer)
        return backward(micro_batches)

    def before_step(step, loss, norm):
        profiler.before_optimizer()
        held.update(adapter_bytes(model))
        return True

    done = []

    def on_step(report):
        profiler.end()
        done.append(report.loss)

    train(
        model,
        micro_batches(4),
        optimizer,
        run_backward=run_backward,
        before_step=before_step,
        on_step=on_step,
    )
    held |= weight_bytes(model) | optimizer_bytes(optimizer)
    return trained(model), done, profiler, held


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("level", ["none", "full"])
def test_a_counted_step_is_the_same_bit_for_bit(base_dir, optim, level):
    ours, losses, profiler, held = run(base_dir, optim, level, {0, 1, 3})
    plain, plain_losses, off, _ = run(base_dir, optim, level, set())
    assert losses == plain_losses
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert off.sizes == {}
    assert off.phases.keys() == {"load", "inject"}
    same = ("weights_quantized", "weights_other", "adapters", "gradients", "optimizer", "paged")
    assert {name: profiler.sizes[name] for name in same} == {name: held[name] for name in same}
    assert set(COMPONENTS) <= profiler.sizes.keys()
    assert min(profiler.sizes[name] for name in ("activations", "loss", "workspace")) > 0


def test_the_peak_has_its_phase_and_its_module(base_dir):
    with processor_with(torch.bfloat16):  # without, the workspace of fp32 matmuls decides
        _, _, profiler, held = run(base_dir, "adamw", "none", {1})
    assert profiler.phases.keys() == {"load", "inject", "forward", "backward", "step"}
    peak, phase, module = profiler.peak
    assert peak == profiler.phases[phase].peak == max(one.peak for one in profiler.phases.values())
    assert (phase, module) == ("backward", "final norm")
    resting = held["weights"] + held["adapters"] + held["gradients"] + held["optimizer"]
    assert profiler.phases["step"].peak >= resting
    assert profiler.phases["load"].peak >= held["weights"]
    assert profiler.record()["step"].keys() == {"peak", "resident"}


def test_recomputing_takes_less_and_is_seen_to(base_dir):
    kept, again = (run(base_dir, "adamw", level, {1})[2].sizes for level in ("none", "full"))
    assert again["activations"] < kept["activations"]
    assert all(again[name] == kept[name] for name in ("adapters", "gradients", "optimizer"))


def test_a_plan_that_is_made_while_a_step_is_counted_takes_no_memory():
    """A full device is planned again in the middle of a step; what a plan holds has no values."""
    profiler = MemoryProfiler(CPU)
    with profiler.loading() as counter:
        counter.at("load")
        plan = plan_memory(length=256)
    assert profiler.peak[0] < 0.1 * plan.peak_bytes
