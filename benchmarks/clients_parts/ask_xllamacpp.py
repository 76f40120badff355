"""llama.cpp in a process of its own: a GGUF model, or a base's with an adapter's beside it.

Its server is asked over loopback, as its users ask it. Keys and values in fp32 and no flash
attention, so that what differs is the file.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from contract import Task, in_order, packed, serve


def started(task: Task) -> Any:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = task["model"]
    asked.n_ctx = task["context"]
    asked.n_parallel = 1
    asked.warmup = False
    asked.cpuparams.n_threads = 1
    asked.n_gpu_layers = 0
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.flash_attn_type = off
    asked.fit_params = False
    asked.verbosity = 0
    if task.get("lora"):
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(task["lora"], 1.0)]
    return xllamacpp.Server(asked)


def answer(task: Task) -> dict[str, Any]:
    server, vocabulary = started(task), task["vocabulary"]

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def drawn(ids: list[int], tokens: int, likely: int = 0) -> Any:
        body = {"prompt": ids, "n_predict": tokens, "n_probs": likely, "temperature": 0}
        body |= {"samplers": ["temperature"], "return_tokens": True, "cache_prompt": False}
        return post("/completion", body)

    def position(ids: list[int]) -> list[float]:
        said = drawn(ids, 1, vocabulary)["completion_probabilities"][0]["top_logprobs"]
        return in_order({one["id"]: one["logprob"] for one in said}, vocabulary)

    rows = []
    for row in task["rows"]:
        greedy = drawn(row["ids"], task["new_tokens"])
        ids, more = row["ids"], row["continuation"]
        asked = {"content": row["text"], "add_special": True}
        rows.append(
            {
                "tokens": post("/tokenize", asked)["tokens"],
                "ids": greedy["tokens"],
                "text": greedy["content"],
                "logprobs": packed(position(ids + more[:at]) for at in range(len(more))),
            }
        )
    return {"rows": rows}


if __name__ == "__main__":
    serve(answer, "xllamacpp")
