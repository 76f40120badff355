"""What each step runs, and what of it is recorded: a dictionary with its bytes and seconds.

The steps share a folder: checkpoints, adapters, a cache. One that needs what another makes finds it
there, or has it made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seven_parts import programs
from seven_parts.process import measured

BENCHMARKS = Path(__file__).resolve().parents[1]
SAMPLE = BENCHMARKS.parent / "qlora_kit/assets/samples/query/valid.jsonl"
GIB = 2**30
ROWS = 8
LOADING = int(1.2 * GIB)
"""What a process that loads may take beside the weights."""
SHARE = 0.05
"""How far a step may be from the plan and the imports."""


@dataclass(frozen=True)
class Run:
    """Where everything lies, in how many bits, and how it is trained."""

    config: Path
    tokenizer: Path
    work: Path
    bits: int
    shards: int
    steps: int
    length: int

    @property
    def cache(self) -> Path:
        """The base cache of these bits."""
        return self.work / f"cache-{self.bits}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process."""
        return {
            "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}",
            "QLORA_KIT_CACHE": str(self.cache),
        }

    def checkpoint(self, shards: int) -> Path:
        """The base in so many files; made where it is not there."""
        path = self.work / f"base-{shards}"
        if not (path / "tokenizer.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            self.python(programs.MAKE, self.config, path, shards, self.tokenizer)
        return path

    @cached_property
    def base(self) -> Path:
        """The one that is worked with: one file."""
        return self.checkpoint(1)

    def adapter(self, name: str = "straight") -> Path:
        """What a run trained."""
        return self.work / f"{name}-{self.bits}"

    @property
    def rows(self) -> Path:
        """Rows that exports are verified and adapters are evaluated on."""
        path = self.work / "rows.jsonl"
        path.write_text("\n".join(SAMPLE.read_text().splitlines()[:ROWS]) + "\n")
        return path

    def python(self, code: str, *arguments: object, **more: Any) -> dict[str, Any]:
        """A program's measurements, with the JSON of its last line."""
        found = measured(["-c", code, *map(str, arguments)], self.environment | more)
        said = found.pop("output").strip().splitlines()
        return found | (json.loads(said[-1]) if said else {})

    def command(self, name: str, *arguments: object, **more: Any) -> dict[str, Any]:
        """A command's measurements, with what it said."""
        given = [*map(str, arguments), "--device", "cpu"]
        return measured(["-m", "qlora_kit", name, *given], self.environment, **more)

    def finetune(self, output: Path, *more: object, model: Path | str = "", **kill: Any) -> Any:
        """Training of some steps with a checkpoint in the middle."""
        return self.command(
            *("finetune", "--model", model or self.base, "--bits", self.bits),
            *("--data", "sample:query", "--eval_fraction", 0, "--packing"),
            *("--max_length", self.length, "--batch_size", 1, "--gradient_accumulation_steps", 1),
            *("--max_steps", self.steps, "--save_steps", self.steps // 2),
            *("--token_cache", "none", "--output_dir", output),
            *more,
            **kill,
        )

    def trained(self) -> Path:
        """An adapter; made where it is not there."""
        if not (self.adapter() / "run.json").exists():
            finetune(self)
        return self.adapter()

    def export(self, model: Path | str, adapter: Path, output: Path) -> dict[str, Any]:
        """An export to 16 bits, verified on a few rows."""
        return self.command(
            *("export", "--model", model, "--bits", self.bits, "--adapter", adapter),
            *("--format", "hf", "--dtype", "bf16", "--verify", self.rows, "--output_dir", output),
            "--overwrite",
        )


def quiet(found: dict[str, Any]) -> dict[str, Any]:
    """Measurements without what was said."""
    return {name: found[name] for name in found if name not in ("output", "killed")}


def encode(run: Run) -> dict[str, Any]:
    """Quantizing and bitsandbytes' operation, nanoseconds a number, on one thread and on two."""
    return {
        f"{threads} threads": run.python(programs.ENCODE, OMP_NUM_THREADS=str(threads))["a_number"]
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


def load(run: Run, checkpoint: Path, *cached: object) -> dict[str, Any]:
    """Loading: the peak beside the weights, and what is allowed."""
    found = run.python(programs.LOAD, checkpoint, run.bits, *cached)
    return quiet(found) | {
        "beside_weights": found["peak_rss"] - found["weights"],
        "allowed": LOADING,
    }


def load_shards(run: Run) -> dict[str, Any]:
    """From several files, without the cache."""
    return load(run, run.checkpoint(run.shards))


def load_one_file(run: Run) -> dict[str, Any]:
    """From one file, without the cache."""
    return load(run, run.base)


def first_start(run: Run) -> dict[str, Any]:
    """From one file, into the cache."""
    shutil.rmtree(run.cache, ignore_errors=True)
    found = load(run, run.base, "cached")
    return found | {"kept": sum(path.stat().st_size for path in run.cache.rglob("base-*"))}


def second_start(run: Run) -> dict[str, Any]:
    """From the cache; and a pass over its files that reads and hashes them, beside it."""
    if not run.cache.exists():
        first_start(run)
    return load(run, run.base, "cached") | {
        name: value
        for name, value in run.python(programs.HASH, run.cache).items()
        if name in ("hash_s", "bytes")
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
        "allowed": largest * 2 + GIB,
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
    """16 tokens."""
    prompt = json.loads(run.rows.read_text().splitlines()[0])["prompt"]
    found = run.command(
        *("generate", "--model", run.base, "--bits", run.bits, "--adapter", run.trained()),
        *("--prompt", prompt, "--max_new_tokens", 16),
    )
    return quiet(found)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of whole steps that a run has written."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [one for one in map(json.loads, lines) if "loss" in one]
    except (OSError, ValueError):
        return []  # none yet, or half a line


def losses(output: Path) -> list[float]:
    """The loss of each step."""
    return [one["loss"] for one in metrics(output)]


def read_run(output: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    said: dict[str, Any] = json.loads((output / "run.json").read_text())
    return said


STEPS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "encode": encode,
    "imports": imports,
    "plan": plan,
    "load, shards": load_shards,
    "load, one file": load_one_file,
    "first start": first_start,
    "second start": second_start,
    "finetune": finetune,
    "kill and resume": resume,
    "export": export,
    "evaluate": evaluate,
    "generate": generate,
}
