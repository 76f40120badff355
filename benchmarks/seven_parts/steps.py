"""What each step runs, and what of it is recorded: a dictionary with its bytes and seconds."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seven_parts import programs
from seven_parts.run import Run, losses, metrics, quiet, read_run

ROUNDS = 5
"""Second starts beside passes that hash: other work on the machine falls on both."""


def encode(run: Run) -> dict[str, Any]:
    """Quantizing and bitsandbytes' operation, nanoseconds a number, on one thread and on two."""
    return {
        f"{threads} threads": run.python(
            programs.ENCODE, {4: "nf4", 8: "int8"}[run.bits], OMP_NUM_THREADS=str(threads)
        )["a_number"]
        for threads in (1, 2)
    }


def imports(run: Run) -> dict[str, Any]:
    """What a process takes that no plan counts: the same commands on `tiny`, less its tensors."""
    adapter = run.adapter("tiny")
    shutil.rmtree(adapter, ignore_errors=True)
    found = run.finetune(adapter, model="tiny")
    planned = read_run(adapter)["memory"]["planned"]["peak"]
    exported = run.export("tiny", adapter, run.work / "tiny-export")
    return {
        **quiet(found),
        "finetune": found["peak_rss"] - planned,
        "export": exported["peak_rss"] - planned,
    }


def plan(run: Run) -> dict[str, Any]:
    """What the run will take, said in advance."""
    found = run.command(
        *("plan", "--model", run.base, "--bits", run.bits, "--max_length", run.length),
        *("--batch_size", 1, "--gradient_accumulation_steps", 1, "--packing", "--json"),
    )
    said = json.loads(found["output"].strip().splitlines()[-1])
    return quiet(found) | {"planned": said["peak_bytes"], "loading": said["host_peak_bytes"]}


def load(run: Run, checkpoint: Path, **how: object) -> dict[str, Any]:
    """Loading: the peak beside the weights, and the bytes of the checkpoint's."""
    options = json.dumps({"base_cache": False} | how)
    found = run.python(programs.LOAD, checkpoint, run.bits, options)
    files = checkpoint.glob("*.safetensors")
    return quiet(found) | {
        "beside_weights": found["peak_rss"] - found["weights"],
        "weights": found["weights"] - found["of_it_on_host"],
        "checkpoint": sum(path.stat().st_size for path in files),
    }


def load_shards(run: Run) -> dict[str, Any]:
    """From several files, without the cache."""
    return load(run, run.checkpoint(run.shards))


def load_one_file(run: Run) -> dict[str, Any]:
    """From one file, without the cache."""
    return load(run, run.base)


def load_small_head(run: Run) -> dict[str, Any]:
    """With a head in 8 bits, and the embedding among what a device would not hold."""
    return load(run, run.base, head_bits=8, embedding_on_host=True)


def first_start(run: Run) -> dict[str, Any]:
    """From one file, into the cache."""
    shutil.rmtree(run.cache, ignore_errors=True)
    found = load(run, run.base, base_cache=True, hashed=True)
    return found | {"kept": sum(path.stat().st_size for path in run.cache.rglob("base-*"))}


def second_start(run: Run) -> dict[str, Any]:
    """From the cache; and a pass over its files that reads and hashes them, by turns with it.

    The row is the load whose time is the median of `ROUNDS`. A pass goes through one MiB of memory
    (`hash_s`), another holds what it has read as a load does (`hold_s`).
    """
    if not run.cache.exists():
        first_start(run)
    loads, passes, holding = [], [], []
    for _ in range(ROUNDS):
        loads.append(load(run, run.base, base_cache=True, hashed=True))
        passes.append(run.python(programs.HASH, run.cache))
        holding.append(run.python(programs.HOLD, run.cache)["seconds"])
    loads.sort(key=lambda one: one["load_s"])
    return loads[ROUNDS // 2] | {
        "hash_s": statistics.median(one["seconds"] for one in passes),
        "hold_s": statistics.median(holding),
        "bytes": passes[0]["bytes"],
    }


def finetune(run: Run) -> dict[str, Any]:
    """A few steps without a stop."""
    shutil.rmtree(run.adapter(), ignore_errors=True)
    found = run.finetune(run.adapter())
    return quiet(found) | {
        "planned": read_run(run.adapter())["memory"]["planned"]["peak"],
        "losses": losses(run.adapter()),
        "step_s": [one["seconds"] for one in metrics(run.adapter())],
    }


def resume(run: Run) -> dict[str, Any]:
    """The same with SIGKILL behind the checkpoint, then resumed: the same losses and bytes."""
    output, middle = run.adapter("killed"), run.steps // 2
    shutil.rmtree(output, ignore_errors=True)
    run.trained()

    def is_behind_the_middle() -> bool:
        saved = (output / f"checkpoint-{middle}" / "manifest.json").exists()
        return saved and len(metrics(output)) >= min(middle + 1, run.steps - 1)

    killed = run.finetune(output, kill_where=is_behind_the_middle)
    begun = len(metrics(output))
    found = run.finetune(output, "--resume_from_checkpoint", "auto")
    weights = [one / "adapter_model.safetensors" for one in (output, run.adapter())]
    return quiet(found) | {
        "killed": killed["killed"],
        "steps_before": begun,
        "equal_losses": losses(output) == losses(run.adapter()),
        "equal_adapters": weights[0].read_bytes() == weights[1].read_bytes(),
    }


def export(run: Run) -> dict[str, Any]:
    """The merged model in 16 bits, read back and compared."""
    output = run.work / f"export-{run.bits}"
    found = run.export(run.base, run.trained(), output)
    verified = json.loads((output / "export.json").read_text())
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    shutil.rmtree(output)
    config = json.loads(run.config.read_text())
    largest = max(config["vocab_size"], config["intermediate_size"]) * config["hidden_size"]
    return quiet(found) | {
        "written": written,
        "kl": verified["kl"],
        "top1_agreement": verified["top1_agreement"],
        "largest": largest * 2,
    }


def evaluate(run: Run) -> dict[str, Any]:
    """The loss of the adapter on a few rows."""
    found = run.command(
        *("evaluate", "--model", run.base, "--bits", run.bits, "--adapter", run.trained()),
        *("--data", run.rows, "--eval_fraction", 0, "--no_exact_match", "--json"),
    )
    text = found["output"]
    said = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return quiet(found) | {"loss": said["loss"]}


def generate(run: Run) -> dict[str, Any]:
    """A few tokens."""
    prompt = json.loads(run.rows.read_text().splitlines()[0])["prompt"]
    found = run.command(
        *("generate", "--model", run.base, "--bits", run.bits, "--adapter", run.trained()),
        *("--prompt", prompt, "--max_new_tokens", 8),
    )
    return quiet(found)


STEPS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "encode": encode,
    "imports": imports,
    "plan": plan,
    "load, shards": load_shards,
    "load, one file": load_one_file,
    "load, small head": load_small_head,
    "first start": first_start,
    "second start": second_start,
    "finetune": finetune,
    "kill and resume": resume,
    "export": export,
    "evaluate": evaluate,
    "generate": generate,
}
