"""lm-eval on a model, or on a base with PEFT's adapter: two tasks of local rows.

One asks for the log-likelihood of each row's completion behind its text, one for what the model
generates behind the text.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from contract import Task, serve

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{completion}}}}"
target_delimiter: ""
"""
GENERATION = """generation_kwargs: {{until: ["{never}"], max_gen_toks: {tokens}, do_sample: false}}
"""


def answer(task: Task) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in task["rows"]))
        for name, kind in (("given", "loglikelihood"), ("drawn", "generate_until")):
            text = COMMON.format(name=name, rows=rows, kind=kind)
            if name == "drawn":
                text += GENERATION.format(never="\\x00", tokens=task["new_tokens"])
                text += "metric_list: [{metric: exact_match}]\n"
            (Path(folder) / f"{name}.yaml").write_text(text)
        settings = {"pretrained": task["base"] if task.get("adapter") else task["model"]}
        settings |= {"dtype": "float32", "max_length": task["context"]}
        if task.get("adapter"):
            settings["peft"] = task["adapter"]
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=settings,
            tasks=["given", "drawn"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            batch_size=1,
            device="cpu",
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = {
        name: sorted(found["samples"][name], key=lambda one: one["doc_id"])
        for name in ("given", "drawn")
    }
    return {
        "rows": [
            {"given": given["resps"][0][0][0], "text": drawn["resps"][0][0]}
            for given, drawn in zip(samples["given"], samples["drawn"], strict=True)
        ]
    }


if __name__ == "__main__":
    serve(answer, "lm-eval", "transformers", "peft", "torch")
