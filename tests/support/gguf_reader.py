"""llama.cpp reading texts with a vocabulary: a model of one tiny layer around it."""

import json
import subprocess
import sys
import urllib.request
import weakref

import gguf
import numpy as np

from qlora_kit.gguf.spaces import general_name

WIDTH = 32
SERVER = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what llama.cpp prints is no answer
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 64
params.n_parallel = 1
params.warmup = params.fit_params = False
params.cpuparams.n_threads = 1
params.n_gpu_layers = 0
params.verbosity = 0
server = xllamacpp.Server(params)
print(server.listening_address, file=answers, flush=True)
sys.stdin.read()
os._exit(0)
"""


def write_vocabulary(found, path, architecture="llama", name="a model", more=()):
    """A GGUF of a one-layer model with a vocabulary."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(general_name(name, found.strips))
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    put_metadata(writer, [*found.metadata(), *more])
    rows = len(found.tokens)
    shapes = {"token_embd": (rows, WIDTH), "output_norm": (WIDTH,), "output": (rows, WIDTH)}
    shapes |= {f"blk.0.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (WIDTH, WIDTH)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def put_metadata(writer, metadata):
    for key, value in metadata:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def end(process):
    """Kill a process that waits for its input."""
    process.kill()
    process.communicate()


class Reader:
    """llama.cpp with the model of a file, in a process of its own.

    Where its server is freed, xllamacpp (2026.10) may wait for a thread that waits for Python's
    lock, for good; no timeout of the tests runs then. That process is killed, and frees nothing.
    """

    def __init__(self, path):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, end, self._process)
        self._address = self._process.stdout.readline().strip()
        assert self._address, "llama.cpp does not take the file"

    def tokens(self, text, special=True):
        asked = {"content": text, "add_special": special, "parse_special": True}
        return self._post("/tokenize", asked)["tokens"]

    def answer(self, wanted, count=4):
        """The tokens of an answer in which each would be `wanted`."""
        asked = {"prompt": [0], "n_predict": count, "temperature": 0, "return_tokens": True}
        return self._post("/completion", {**asked, "logit_bias": [[wanted, 100.0]]})

    def chat(self, messages):
        """The text that llama.cpp makes of a chat by the file's template."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def _post(self, path, body):
        request = urllib.request.Request(
            self._address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read())
