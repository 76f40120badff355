"""The parts of a run that train: a model with adapters, its optimizer, its guard, its memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlora_kit.base.load import read_weights
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.inject import inject_lora, train_loaded
from qlora_kit.memory.profiler import MemoryProfiler
from qlora_kit.process.signals import StopSignals
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.replan import Replan
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.result import Memory
from qlora_kit.training.guard import Guard
from qlora_kit.training.optimizer import learning_rates, make_optimizer, paging_note
from qlora_kit.training.prepare import prepare_model


class Assembled:
    """What the steps of a run need; `names` are those of the trained parameters (fp32 masters)."""

    def __init__(self, plan: PreparedRun, reporter: Reporter, signals: StopSignals) -> None:
        training = plan.config.training
        reporter.loading(plan.base)
        profiler = MemoryProfiler(plan.base.device)
        self.model = _with_adapters(plan, profiler, reporter)
        levels, packing = plan.memory.levels, plan.config.data.packing
        placement = plan.memory.placement
        if left_alone := prepare_model(self.model, training, levels, packing, placement):
            reporter.note(left_alone)
        self.optimizer = make_optimizer(
            training.optim, self.model.parameters(), training.peak_rate, training.weight_decay
        )
        if note := paging_note(training.optim, self.model.parameters(), plan.base.device):
            reporter.note(note)
        self.learning_rate = learning_rates(training, plan.schedule.num_steps)

        def rows_of(step: int) -> str:
            """The places of a step's rows among those that are trained on, counted from 0."""
            return ", ".join(map(str, plan.schedule.rows_of(step)))

        self.replan = Replan(plan, self.model, reporter.note)
        self.guard = Guard(
            self.model,
            signals=signals,
            note=reporter.note,
            rows_of=rows_of,
            recompute_more=self.replan,
        )
        self.memory = Memory(self.model, self.optimizer, profiler)
        self.names: dict[Tensor, str] = {
            p: name for name, p in self.model.named_parameters() if p.requires_grad
        }


def _with_adapters(plan: PreparedRun, profiler: MemoryProfiler, reporter: Reporter) -> Any:
    """The base's model with new adapters, or with the one that the run goes on from."""
    with profiler.loading() as counter:
        counter.at("load")
        model = read_weights(plan.base, counter.tag, plan.memory.placement, reporter.note)
        seed = plan.config.training.seed
        counter.at("inject")
        if plan.start.files is None:
            return inject_lora(model, plan.config.lora, seed=seed)
        # The base was compared when the adapter's files were opened.
        load_adapter(plan.base, plan.start.files, allow_other_base=True, seed=seed)
        return train_loaded(model, plan.config.lora, seed=seed)
