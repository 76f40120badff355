"""Our own model, as it was trained or on another base: what the clients are compared with.

`options` are those of a command, by the name of each model: none, and the base is the one of
training; `--bits 16`, and the adapter lies on the unquantized base, as in a client that serves it
there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from contract import Task, packed, serve  # noqa: E402


def answer(task: Task) -> dict[str, Any]:
    """The answers of all of our models by their names; the first decides the continuations."""
    said: dict[str, Any] = {}
    for name, options in task["options"].items():
        said[name] = one_model(task, options)
        for row, mine in zip(task["rows"], said[name]["rows"], strict=True):
            row["continuation"] = mine["continuation"]
    return said


def one_model(task: Task, options: list[str]) -> dict[str, Any]:
    import torch

    from qlora_kit.commands.argv import parse
    from qlora_kit.config.base import BaseConfig
    from qlora_kit.config.export import ExportConfig
    from qlora_kit.data.encode import prompt_ids
    from qlora_kit.generation.decode import end_ids, generate_ids
    from qlora_kit.generation.text import added_text
    from qlora_kit.run.adapted_base import AdaptedBase
    from qlora_kit.run.named_base import Named

    groups = (ExportConfig, BaseConfig)
    parsed = parse("clients", "", groups, ["--adapter", task["adapter"], *options])
    opened = AdaptedBase.open(Named.open(parsed, task["adapter"]))
    model, tokenizer = opened.load().eval(), opened.base.tokenizer
    ends, rows = end_ids(model, tokenizer), []
    for row in task["rows"]:
        prompt = prompt_ids(row["text"], tokenizer, False, True)
        steps = generate_ids(
            model, [prompt], max_new_tokens=task["new_tokens"], eos_ids=ends, pad_id=0
        )
        drawn = [step[0] for step in steps]
        # The end is a token as well, where the answer comes to it.
        continuation = row.get("continuation") or (
            drawn if len(drawn) == task["new_tokens"] else [*drawn, tokenizer.eos_token_id]
        )
        # As lm-eval splits them: the spaces and line ends of a prompt belong to what follows.
        together = tokenizer(row["text"] + row["completion"])["input_ids"]
        before = len(tokenizer(row["text"].rstrip())["input_ids"])
        with torch.no_grad():
            whole = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
            rest = model(torch.tensor([together])).logits[0, before - 1 : -1].double()
        given = torch.tensor(together[before:])
        likely = rest.log_softmax(1)[torch.arange(len(given)), given]
        rows.append(
            {
                "tokens": prompt,
                "ids": drawn,
                "text": added_text(tokenizer, drawn, prompt),
                "continuation": continuation,
                "logprobs": packed(whole.log_softmax(1).tolist()),
                "given": likely.sum().item(),
            }
        )
    return {"rows": rows, "ends": sorted(ends)}


if __name__ == "__main__":
    serve(answer, ours=True)
