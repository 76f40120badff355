"""Python that the steps of `seven_billion.py` run, each in a process of its own."""

MAKE = """
import sys
from pathlib import Path
from random_checkpoint import copy_tokenizer, make_checkpoint
make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
copy_tokenizer(Path(sys.argv[4]), Path(sys.argv[2]))
"""
LOAD = """
import json, sys, time
import torch
from qlora_kit.base.load import load_base
from qlora_kit.device.found import peak_bytes
from qlora_kit.memory.counter import weight_bytes
imports, began, used = peak_bytes(torch.device("cpu")), time.perf_counter(), time.process_time()
cached = len(sys.argv) > 3
base = load_base(sys.argv[1], bits=int(sys.argv[2]), device="cpu", base_cache=cached)
took, used = time.perf_counter() - began, time.process_time() - used
print(json.dumps({"load_s": took, "load_cpu_s": used, "imports": imports,
                  "weights": weight_bytes(base.model)["weights"]}))
"""
HASH = """
import hashlib, json, sys, time
from pathlib import Path
began, size = time.perf_counter(), 0
for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
            size += len(piece)
print(json.dumps({"hash_s": time.perf_counter() - began, "bytes": size}))
"""
ENCODE = """
import json, time, torch
from qlora_kit.base.linear import quantize_linear
from qlora_kit.base.encode_weight import encode_blocks, encode_rows
weight, found = (torch.randn(4096, 4096) / 50).bfloat16(), {}
theirs = torch.ops.bitsandbytes
ways = {
    "nf4": lambda: encode_blocks(weight.view(-1), "nf4"),
    "nf4, bitsandbytes": lambda: theirs.quantize_4bit.default(
        weight.view(-1), 64, "nf4", torch.uint8
    ),
    "int8": lambda: encode_rows(weight),
    "int8, bitsandbytes": lambda: theirs.int8_vectorwise_quant.default(weight.half()),
}
for name, way in ways.items():
    way()
    best = [float("inf")] * 2
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        way()
        best = [min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)]
    wall, cpu = (one / weight.numel() * 1e9 for one in best)
    found[name] = {"wall_ns": wall, "cpu_ns": cpu}
print(json.dumps({"threads": torch.get_num_threads(), "a_number": found}))
"""
