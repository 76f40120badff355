"""Time and peak memory of reading 8-bit floats, and of the error of quantizing, on a 1.1 B Llama.

A checkpoint of bf16 and one of 8-bit floats in blocks of 128 x 128, made of the same numbers, are
loaded in 4 bits, and `plan --quantization_error` reads each of them. Each measurement is a process
of its own; its peak is the resident set as the kernel reports it. Seconds of the processor are
given beside those of the clock, which other processes on the machine lengthen. Needs
QLORA_KIT_DATA and 6 GB of disk and memory.

    python benchmarks/float8.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from safetensors.torch import load_file, save_file

BLOCK, LARGEST = 128, 448.0
SAID = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
MEASURE = """
import json, sys, time, torch
from qlora_kit.base.load import load_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.device.found import peak_bytes
from qlora_kit.plan.quantization_error import quantization_errors
what, directory = sys.argv[1:]
began, used = time.perf_counter(), time.process_time()
found = {}
if what == "load":
    load_base(directory, bits=4, dtype="bf16", device="cpu")
else:
    errors = quantization_errors(BaseConfig(directory, bits=4, dtype="bf16", device="cpu"))
    found = {"linears": len(errors.linears), "worst": errors.linears[0].error}
    found["best"] = errors.linears[-1].error
found |= {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - used}
print(json.dumps(found | {"peak_rss": peak_bytes(torch.device("cpu"))}))
"""


def make_float8(source: Path, target: Path) -> None:
    """A copy of a checkpoint whose decoder's matrices are 8-bit floats in blocks."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, weight in list(tensors.items()):
        if weight.dim() != 2 or ".layers." not in name:
            continue
        rows, columns = weight.shape
        assert rows % BLOCK == columns % BLOCK == 0
        parts = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = parts.abs().amax((1, 3)) / LARGEST
        floats = (parts / scales[:, None, :, None]).view(rows, columns)
        tensors[name] = floats.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": SAID}
    (target / "config.json").write_text(json.dumps(config))


def measure(what: str, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, str(directory)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = make_parser(__doc__, "float8")
    data = Path(os.environ["QLORA_KIT_DATA"])
    parser.add_argument("--config", type=Path, default=data / "configs/tinyllama_1b_chat_v1.0.json")
    arguments = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(arguments.config, folder / "bf16")
        copy_tokenizer(data / "models/stories260K", folder / "bf16")
        make_float8(folder / "bf16", folder / "float8")
        for form in ("bf16", "float8"):
            for what in ("load", "quantization_error"):
                row = {"files": form, "what": what, **measure(what, folder / form)}
                table.append(row)
                print(json.dumps(row), flush=True)
    print(write_result(arguments, {"shape": arguments.config.stem, "bits": 4, "table": table}))


if __name__ == "__main__":
    main()
