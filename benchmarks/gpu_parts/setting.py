"""What every part of the GPU benchmark is given: the device, what was prepared, how to measure."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import Noise

from gpu_parts.shapes import Point, shape_of, short, write_shape
from qlora_kit.base.config_only import open_shape
from qlora_kit.base.fill import fill
from qlora_kit.base.linear import quantize_linear
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.profiler import count_step
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

RANK = 16


@dataclass
class Model:
    """A base with adapters on all linears and its optimizer, ready for steps."""

    model: Any
    optimizer: torch.optim.Optimizer
    fused: str | None
    """Why no blocks are fused, where none are."""
    steps: int = 0

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step; its loss, on the device."""
        self.steps += 1
        loss, _ = train_step(
            self.model, batches, self.optimizer, step=self.steps, max_grad_norm=1.0
        )
        return loss


@dataclass
class Setting:
    """One run of the benchmark on a device, with small models or real ones.

    `prepared` is the folder that gpu_prepare.py made, None where there is none. `scratch` is a
    folder that is removed in the end. `models` are shared between parts.
    """

    device: torch.device
    small: bool
    prepared: Path | None
    scratch: Path
    models: dict[tuple[str, str], Model] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    def short(self, length: int) -> int:
        """A number of tokens, or what stands for it with small models."""
        return short(length, self.small)

    def planned(self, point: Point) -> dict[str, Any] | None:
        """The plan of a point that was made beforehand for this device, as `plan --json` has it."""
        if self.prepared is None or not (self.prepared / "plans.json").exists():
            return None
        plans = json.loads((self.prepared / "plans.json").read_text())
        shape = shape_of(point.model, self.small)
        if plans["device"] != self.device.type or plans["shapes"].get(point.model) != shape:
            return None  # made for others
        found: dict[str, Any] | None = plans["plans"].get(point.name)
        return found

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], times: int, warm_up: int = 1) -> list[float]:
        """What each of some calls takes, after those that warm up."""
        taken = []
        for number in range(warm_up + times):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            if number >= warm_up:
                taken.append(time.perf_counter() - began)
        return taken

    def median_s(self, call: Callable[[], Any], times: int, warm_up: int = 1) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds(call, times, warm_up))

    def model(self, name: str, dtype: str = "bf16") -> Model:
        """A model of a shape in 4 bits, made once from noise through the package's own loading."""
        if (name, dtype) not in self.models:
            self.models[name, dtype] = self._made(name, dtype)
        return self.models[name, dtype]

    def forget(self, keep: Sequence[str] = ()) -> None:
        """Free the shared models but for those of some names."""
        self.models = {key: one for key, one in self.models.items() if key[0] in keep}
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def base(self, name: str, dtype: str = "bf16", bits: int = 4) -> Any:
        """The base of a shape, without weights."""
        path = write_shape(name, self.small, self.scratch)
        config = BaseConfig(str(path), bits=bits, dtype=dtype, device=self.device.type)
        return replace(open_shape(config, self.device), device=self.device)

    def _made(self, name: str, dtype: str) -> Model:
        return self.adapted(fill(self.base(name, dtype), Noise(), quantize=quantize_linear))

    def adapted(self, base: Any) -> Model:
        """A filled base with adapters on all linears."""
        training = training_options()
        model = inject_lora(base, lora_options(), seed=training.seed)
        fused = prepare_model(model, training, "none")
        model.train()
        optimizer = make_optimizer("adamw", model.parameters(), 1e-4)
        return Model(model, optimizer, fused)

    def batches(self, point: Point, model: Any, seed: int = 0) -> list[Batch]:
        """The micro-batches of a point's step: random tokens, all of them trained on."""
        vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(seed)

        def row(length: int) -> Encoded:
            ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
            return Encoded(ids, ids)

        lengths = point.row_lengths(self.small)
        return [
            collate_packs([[row(length) for length in lengths] for _ in range(point.rows)], 0)
            for _ in range(point.micro_steps)
        ]

    def measured(self, model: Model, point: Point) -> dict[str, Any]:
        """Bytes of a step at a point: the most allocated and reserved; counted on the CPU."""
        set_recompute(model.model, point.level)
        batches = self.batches(point, model.model)
        model.step(batches)  # states, workspaces and kernels are there from here on
        if not self.cuda:
            with own_workspace({}):  # not what an earlier part left in it
                model.step(batches)
                with count_step(model.model, model.optimizer, micro_batches=batches) as counter:
                    model.step(batches)
            return {"allocated_bytes": counter.peak}
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model.step(batches)
        self.wait()
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "outside_bytes": total - free - torch.cuda.memory_reserved(),
            "retries": stats.get("num_alloc_retries", 0),
        }

    def compared(self, model: Model, point: Point) -> dict[str, Any]:
        """`measured` beside the plan, with the error of the plan's peak over the step."""
        found, plan = self.measured(model, point), self.planned(point)
        if plan is None:
            return found
        planned = max(plan["phases"].get(one, 0) for one in ("forward", "backward", "step"))
        error = planned / found["allocated_bytes"] - 1
        return {"planned_bytes": planned, **found, "error": error}


def lora_options(targets: str = "all-linear") -> LoRAConfig:
    """Adapters of every model that is measured."""
    return LoRAConfig(r=RANK, alpha=2 * RANK, target_modules=targets)


def training_options(**options: Any) -> TrainingConfig:
    """Training of every model that is measured."""
    return TrainingConfig(optim="adamw", gradient_accumulation_steps=1, **options)
