"""What measuring costs a run while no step is counted: steps with and without its code, in turn.

Both sides are the same model and optimizer; only the calls around the step differ. The whole cost
is three calls that find nothing to do, so a ratio beyond 1 % is noise of the machine or a mistake.

    python benchmarks/measure_cost.py               # 50 steps of each, the model that ships
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from record import make_parser, write_result

from qlora_kit.base.load import load_base
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora
from qlora_kit.memory.profiler import MemoryProfiler
from qlora_kit.run.result import Memory
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer

WARM_UP = 5
SETTINGS = ("model", "bits", "steps", "batch", "length")


def main() -> None:
    parser = make_parser(__doc__, "measure_cost")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of each side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in SETTINGS}
    model = load_base(given.model, bits=given.bits).model
    inject_lora(model)
    model.train()
    optimizer = make_optimizer("adamw", model.parameters(), 1e-4)
    device = model.device
    memory = Memory(model, optimizer, MemoryProfiler(device))
    row = Encoded([5] * given.length, [5] * given.length)
    micro_batches = [collate([row] * given.batch, 0)]

    def run_backward(backward: Any, parts: Any) -> Any:
        memory.before_step(1)
        return backward(parts)

    def before_step(step: int, loss: Any, norm: Any) -> bool:
        memory.after_backward()
        return True

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(WARM_UP + given.steps):
        for side, taken in seconds.items():
            hooks = (
                {"run_backward": run_backward, "before_step": before_step} if side == "with" else {}
            )
            began = time.perf_counter()
            train_step(model, micro_batches, optimizer, step=number + 1, max_grad_norm=1.0, **hooks)
            if side == "with":
                memory.after_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                taken.append(time.perf_counter() - began)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    ratio = medians["with"] / medians["without"]
    print(f"with {medians['with']:.5f} s, without {medians['without']:.5f} s, ratio {ratio:.4f}")
    print(write_result(given, {**settings, "step_s": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()
