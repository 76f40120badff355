"""The command `serve`, which on SIGRTMIN writes what its process holds to a file.

python -m serving_parts.counted COUNTS.json --model tiny ...
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType


def counts() -> dict[str, int]:
    """Bytes of live tensors, each storage once; numbers of objects, tasks and threads."""
    import torch

    gc.collect()
    storages, objects, tasks = {}, gc.get_objects(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in objects:
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            tasks += isinstance(one, asyncio.Task)
    return {
        "tensor_bytes": sum(storages.values()),
        "objects": len(objects),
        "tasks": tasks,
        "threads": threading.active_count(),
    }


def main() -> int:
    """Run the command."""
    from qlora_kit.commands.serve import main as serve

    path, given = Path(sys.argv[1]), sys.argv[2:]

    def write(number: int, frame: FrameType | None) -> None:
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(counts()))
        os.replace(aside, path)

    signal.signal(signal.SIGRTMIN, write)
    return serve(given)


if __name__ == "__main__":
    raise SystemExit(main())
