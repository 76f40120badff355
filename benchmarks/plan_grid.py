"""Planned against counted bytes of a step on the CPU, over a grid, and the table of their errors.

    python benchmarks/plan_grid.py --shapes tiny stories shape --result plan_grid

Each base is loaded once for all its levels and windows; of each a real step is counted
(memory/profiler.py) and planned. `stories` is stories260K of --data, `shape` a random Llama of
160 M. Writes results/plan_grid.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import random_checkpoint
import record
import torch

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import Batch, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.counter import COMPONENTS, StorageCounter
from qlora_kit.memory.profiler import count_step
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

MICRO_STEPS = 2
LEVELS = ("none", "selective", "full")
SHAPES = ("tiny", "stories", "shape")
# A Llama of 160 M, by name and sizes of a common small model.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Count, plan, compare and write."""
    parser = record.make_parser(__doc__, "plan_grid")
    parser.add_argument(
        "--shapes", nargs="+", default=["tiny"], choices=("tiny", "stories", "shape")
    )
    parser.add_argument("--data", type=Path, help="folder with models/stories260K")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer `shape` takes")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    asked = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in asked.shapes:
            model = _model(shape, asked, Path(scratch))
            for bits, targets, optim in itertools.product(
                asked.bits, ("auto", "all-linear"), ("adamw", "paged_adamw_8bit")
            ):
                points += _points(shape, model, bits, targets, optim, asked)
    largest = max(point["error_bytes"] for point in points)
    print(f"{len(points)} points, the largest difference {largest} bytes")
    print(record.write_result(asked, {"largest_error_bytes": largest, "points": points}))


def _model(shape: str, asked: argparse.Namespace, scratch: Path) -> str:
    """The directory of a base, or its name."""
    if shape == "tiny":
        return "tiny"
    if shape == "stories":
        return str(asked.data / "models" / "stories260K")
    return str(random_checkpoint.make_base_files(SHAPE, scratch / "shape", asked.tokenizer))


def _points(
    shape: str, name: str, bits: int, targets: str, optim: str, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """All levels, batches and lengths of one loaded base."""
    base = BaseConfig(name, bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(target_modules=targets)
    training = TrainingConfig(optim=optim, gradient_accumulation_steps=MICRO_STEPS)
    planner = Planner(base, lora, training)
    points = []
    with own_workspace({}):
        model = inject_lora(read_weights(open_base(base)), lora, seed=training.seed)
        prepare_model(model, training, "none")
        optimizer = make_optimizer(training.optim, model.parameters(), 1e-4)
        model.train()
        run_step(model, optimizer, window(1, 16))  # makes the states, and the workspace
        for level, rows, length, packed in itertools.product(
            LEVELS, asked.rows, asked.lengths, (False, True)
        ):
            if length > planner.run.context:
                continue
            longest, batches = length - length // 4, window(rows, length, packed)
            supervised = batches[0]["num_supervised"] // rows
            plan = planner.plan(BatchShape(rows, length, supervised, packed, longest), level)
            set_recompute(model, level)
            counted = counted_step(model, optimizer, batches)
            planned = {**{name: plan.bytes[name] for name in COMPONENTS}, **plan.phases}
            planned = {name: planned[name] for name in counted}
            error = max(abs(planned[name] - counted[name]) for name in counted)
            points.append(
                {
                    "shape": shape,
                    "bits": bits,
                    "level": level,
                    "rows": rows,
                    "length": length,
                    "packed": packed,
                    "targets": targets,
                    "optim": optim,
                    "planned": planned,
                    "counted": counted,
                    "error_bytes": error,
                }
            )
            kind = f"{rows} x {length}{' packed' if packed else ''} {targets} {optim}"
            print(f"{shape} {bits} {level} {kind}: {error} bytes off")
    return points


def window(
    rows: int, length: int, packed: bool = False, micro_steps: int = MICRO_STEPS
) -> list[Batch]:
    """Micro-batches of whole rows, or of packs of two rows, all trained on."""
    parts = [length - length // 4, length // 4] if packed else [length]
    pack = [Encoded([1] * part, [1] * part) for part in parts]
    return [collate_packs([pack] * rows, 0) for _ in range(micro_steps)]


def counted_step(
    model: Any, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]
) -> dict[str, int]:
    """Components and the peak of each phase of a real step, not the first one."""
    with count_step(model, optimizer, micro_batches=micro_batches) as counter:
        run_step(model, optimizer, micro_batches, counter)
    intervals = [one for one in counter.intervals if one.phase]
    passes = [one for one in intervals if one.phase != "step"]
    sizes = {name: max(one.largest.get(name, 0) for one in passes) for name in COMPONENTS}
    sizes["optimizer"] = passes[0].start["optimizer"]
    for phase in ("forward", "backward", "step"):
        sizes[phase] = max(one.peak for one in intervals if one.phase == phase)
    return sizes


def run_step(
    model: Any, optimizer: Any, micro_batches: list[Batch], counter: StorageCounter | None = None
) -> None:
    """One step, with its intervals where it is counted."""

    def passes(backward: Any, micro_batches: Any) -> torch.Tensor:
        loss: torch.Tensor = backward(micro_batches)
        if counter is not None:
            counter.at("step")
            counter.filling = "optimizer"
        return loss

    train_step(model, micro_batches, optimizer, step=1, max_grad_norm=1.0, run_backward=passes)


if __name__ == "__main__":
    main()
