"""What a process takes of a GPU outside its tensors: a row of `qlora_kit/device/found.py`.

    python benchmarks/device_overhead.py

Context, libraries and their workspaces are what the driver says is taken while one product has been
computed, less what the allocator holds. The allocator's rounding is measured on a real step, as
reserved against allocated bytes. Writes results/device_overhead.json; needs CUDA.
"""

from __future__ import annotations

import record
import torch

from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train_step
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.prepare import prepare_model

LENGTH, ROWS, STEPS = 128, 8, 3


def main() -> None:
    """Measure and write."""
    given = record.make_parser(__doc__, "device_overhead").parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; run this where the GPU is")
    device = torch.device("cuda")
    free_before, total = torch.cuda.mem_get_info(device)
    base, training = BaseConfig("tiny", bits=4, device="cuda"), TrainingConfig()
    model = inject_lora(read_weights(open_base(base)), LoRAConfig())
    prepare_model(model, training, "none")
    optimizer = make_optimizer("paged_adamw_8bit", model.parameters(), 1e-4)
    model.train()
    row = Encoded([1] * LENGTH, [1] * LENGTH)
    for step in range(1, STEPS + 1):
        train_step(model, [collate([row] * ROWS, 0)], optimizer, step=step, max_grad_norm=1.0)
    torch.cuda.synchronize()
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    free_after, _ = torch.cuda.mem_get_info(device)
    # The context was there before the first question; other processes are not told apart.
    fixed = total - free_after - reserved
    result = {
        "device": torch.cuda.get_device_name(device),
        "fixed_bytes": fixed,
        "context_bytes": total - free_before,
        "reserved_bytes": reserved,
        "allocated_bytes": allocated,
    }
    print(f"{result['device']}: {fixed} bytes outside the allocator")
    print(record.write_result(given, result))


if __name__ == "__main__":
    main()
