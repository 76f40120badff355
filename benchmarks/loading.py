"""Time and peak memory of loading a 1.1 B Llama in 4, 8 and 16 bits, as one file and as shards.

Each load is a process of its own; its peak is the resident set as the kernel reports it, imports
and file pages included. Needs QLORA_KIT_DATA (for the shape and a tokenizer) and 5 GB of disk.

    python benchmarks/loading.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result

LOAD = """
import json, sys, time
from qlora_kit.base.load import load_base
from qlora_kit.device.found import peak_bytes
from qlora_kit.memory.counter import weight_bytes
began = time.perf_counter()
model = load_base(sys.argv[1], bits=int(sys.argv[2]), dtype="bf16", device="cpu").model
seconds = time.perf_counter() - began
peak = peak_bytes(model.device)
print(json.dumps({"seconds": seconds, "peak_rss": peak, "weights": weight_bytes(model)["weights"]}))
"""


def load_once(directory: Path, bits: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(directory), str(bits)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = make_parser(__doc__, "loading")
    data = Path(os.environ["QLORA_KIT_DATA"])
    parser.add_argument("--config", type=Path, default=data / "configs/tinyllama_1b_chat_v1.0.json")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    arguments = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for shards in (1, 3):
            directory = Path(temporary) / f"shards-{shards}"
            make_checkpoint(arguments.config, directory, shards)
            copy_tokenizer(data / "models/stories260K", directory)
            for bits in arguments.bits:
                row = {"bits": bits, "files": shards, **load_once(directory, bits)}
                row["above_weights"] = row["peak_rss"] - row["weights"]
                table.append(row)
                print(
                    f"{bits:>2} bits, {shards} files: {row['seconds']:.1f} s, "
                    f"weights {row['weights'] / 2**30:.3f} GiB, "
                    f"peak RSS {row['peak_rss'] / 2**30:.3f} GiB",
                    flush=True,
                )
    print(write_result(arguments, {"shape": arguments.config.stem, "table": table}))


if __name__ == "__main__":
    main()
