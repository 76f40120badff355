"""What a process takes of a GPU outside its tensors: a row of `qlora_kit/device/found.py`.

    python benchmarks/device_overhead.py                  # the 8B shape, 1 x 2048
    python benchmarks/device_overhead.py --small          # where the card does not hold it

Context, libraries and their workspaces are what the driver says is taken after some steps, less
what the allocator holds; the allocator's own part is what it has reserved over what was allocated.
The steps are those of a real shape, with noise for weights: small ones load fewer libraries, and
blocks of 2 MiB hide in their rounding. Writes results/device_overhead.json; needs CUDA.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import record
import torch
from gpu_parts.setting import Setting
from gpu_parts.shapes import BIG, LITTLE, Point

LEVELS = ("full", "selective", "none")
LENGTH = 2048


def main() -> None:
    """Measure and write."""
    parser = record.make_parser(__doc__, "device_overhead")
    parser.add_argument("--small", action="store_true", help="the 1B shape")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; run this where the GPU is")
    free, total = torch.cuda.mem_get_info()
    name, steps = LITTLE if given.small else BIG, {}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(torch.device("cuda"), False, None, Path(folder))
        model = setting.model(name)
        for level in LEVELS:
            steps[level] = setting.measured(model, Point(name, LENGTH, level))
    # The context was there before the first question; other processes are not told apart.
    fixed = max(one["outside_bytes"] for one in steps.values())
    shares = (one["reserved_bytes"] / one["allocated_bytes"] - 1 for one in steps.values())
    result = {
        "device": torch.cuda.get_device_name(),
        "shape": name,
        "tokens": LENGTH,
        "fixed_bytes": fixed,
        "share": max(shares),
        "context_bytes": total - free,
        "steps": steps,
    }
    print(f"{result['device']}: {fixed} bytes outside the allocator, {result['share']:.1%} in it")
    print(record.write_result(given, result))


if __name__ == "__main__":
    main()
