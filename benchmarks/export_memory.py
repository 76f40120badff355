"""Peak memory of exporting a 1.1 B Llama to each format, above what the loaded model takes.

Each export is a process of its own that holds the base in 4 bits with adapters on all linears. Its
anonymous memory, without pages of files, is read every two milliseconds from outside. The bound is
the largest tensor in fp32 and 0.3 GiB. Needs QLORA_KIT_DATA (for the shape and a tokenizer) and
8 GB of disk.

    python benchmarks/export_memory.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result

from qlora_kit.config.export import DTYPES, MERGED, QUANTIZED

EXPORT = """
import gc, json, sys
import torch
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import QloraKitError
from qlora_kit.export.export import export_model
from qlora_kit.lora.inject import inject_lora, lora_layers
base = load_base(sys.argv[1], bits=4, dtype="bf16", device="cpu")
inject_lora(base.model, LoRAConfig(r=16, alpha=32, target_modules="all-linear"))
for layer in lora_layers(base.model).values():
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
largest = max(weight.numel() for weight in base.model.get_input_embeddings().parameters())
largest = max(largest, *(
    layer.base_layer.in_features * layer.base_layer.out_features
    for layer in lora_layers(base.model).values()
))
gc.collect()
print(json.dumps({"largest_fp32": 4 * largest}), flush=True)
sys.stdin.readline()
try:
    export_model(base, sys.argv[2], **json.loads(sys.argv[3]))
    print("{}", flush=True)
except QloraKitError as error:
    print(json.dumps({"not_available": error.problem}), flush=True)
sys.stdin.readline()
"""
ALLOWED = int(0.3 * 2**30)
EVERY_S = 0.002


def anonymous_bytes(process: int) -> int:
    """What a process holds that is no page of a file."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


def measure(checkpoint: Path, target: Path, form: dict[str, str]) -> dict[str, Any]:
    """One export: bytes before it, the most meanwhile, and what is allowed."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(target), json.dumps(form)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        loaded = json.loads(child.stdout.readline())
        before, peak, done = anonymous_bytes(child.pid), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous_bytes(child.pid))
                time.sleep(EVERY_S)

        watcher = threading.Thread(target=watch)
        watcher.start()
        child.stdin.write("\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
        done.set()
        watcher.join()
        child.stdin.close()
    if answer:
        return {**form, **answer}
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {
        **form,
        "written": written,
        "loaded": before,
        "above_loaded": peak - before,
        "allowed": loaded["largest_fp32"] + ALLOWED,
    }


def main() -> None:
    parser = make_parser(__doc__, "export_memory")
    data = Path(os.environ.get("QLORA_KIT_DATA", ""))
    parser.add_argument("--config", type=Path, default=data / "configs/tinyllama_1b_chat_v1.0.json")
    parser.add_argument("--formats", nargs="+", default=MERGED, choices=MERGED)
    parser.add_argument("--dtypes", nargs="+", help="of hf and gguf, these alone")
    given = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, target = Path(temporary) / "base", Path(temporary) / "export"
        make_checkpoint(given.config, checkpoint)
        copy_tokenizer(data / "models/stories260K", checkpoint)
        for form in forms(given.formats):
            if given.dtypes and form.get("dtype", given.dtypes[0]) not in given.dtypes:
                continue
            row = measure(checkpoint, target, form)
            shutil.rmtree(target, ignore_errors=True)
            table.append(row)
            print(shown(row), flush=True)
            write_result(given, {"shape": given.config.stem, "bits": 4, "table": table})


def forms(formats: list[str]) -> list[dict[str, str]]:
    """The options of each export: every dtype of a format, and what quantizes once unmerged too."""
    found = []
    for name in formats:
        if name in QUANTIZED:
            found += [{"format": name, "merge_base": one} for one in ("none", "dequantized")]
        else:
            dtypes = DTYPES if name == "hf" else (*DTYPES, "q8_0", "q4_0")
            found += [{"format": name, "dtype": dtype} for dtype in dtypes]
    return found


def shown(row: dict[str, Any]) -> str:
    label = f"{row['format']:<9} {row.get('dtype') or row['merge_base']:<12}"
    if "not_available" in row:
        return f"{label} not available: {row['not_available']}"
    names = ("written", "loaded", "above_loaded", "allowed")
    written, loaded, above, allowed = (f"{row[name] / 2**30:.3f} GiB" for name in names)
    return f"{label} {written} written, {loaded} loaded, {above} above it, {allowed} allowed"


if __name__ == "__main__":
    main()
