"""Python that the steps of `seven_billion.py` run, each in a process of its own."""

MAKE = """
import sys
from pathlib import Path
from random_checkpoint import copy_tokenizer, make_checkpoint
make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
copy_tokenizer(Path(sys.argv[4]), Path(sys.argv[2]))
"""
LOAD = """
import hashlib, json, sys, time
import torch
from qlora_kit.base.embedding import HostEmbedding
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.base.tensor_file import tensor_bytes
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.training import Placement
from qlora_kit.device.found import peak_bytes
from qlora_kit.memory.counter import weight_bytes
how = json.loads(sys.argv[3])
place = Placement(embedding_on_host=how.pop("embedding_on_host", False))
hashed = how.pop("hashed", False)
imports, began, used = peak_bytes(torch.device("cpu")), time.perf_counter(), time.process_time()
base = open_base(BaseConfig(sys.argv[1], bits=int(sys.argv[2]), device="cpu", **how))
model = read_weights(base, placement=place)
took, used = time.perf_counter() - began, time.process_time() - used
hosted = sum(one.weight.nbytes for one in model.modules() if isinstance(one, HostEmbedding))
said = {"load_s": took, "load_cpu_s": used, "imports": imports,
        "weights": weight_bytes(model)["weights"], "of_it_on_host": hosted}
if hashed:
    digest = hashlib.sha256()
    for name, one in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(one))
    said["tensors"] = digest.hexdigest()
print(json.dumps(said))
"""
HASH = """
import hashlib, json, sys, time
from pathlib import Path
piece, count, began = memoryview(bytearray(2**20)), 0, time.perf_counter()
for path in sorted(Path(sys.argv[1]).rglob("base-*.safetensors")):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(piece[:read])
            count += read
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": count}))
"""
HOLD = """
import hashlib, json, sys, time
from pathlib import Path
held, began = [], time.perf_counter()
for path in sorted(Path(sys.argv[1]).rglob("base-*.safetensors")):
    held.append(path.read_bytes())
    hashlib.sha256(held[-1])
print(json.dumps({"seconds": time.perf_counter() - began}))
"""
ENCODE = """
import json, sys, time, torch
import qlora_kit.base.quantize  # which imports bitsandbytes with its operations
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
    if not name.startswith(sys.argv[1]):
        continue
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
