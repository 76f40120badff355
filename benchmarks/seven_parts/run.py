"""Where the steps of `seven_billion.py` work, and the processes that they run.

The steps share a folder: checkpoints, adapters, a cache. One that needs what another makes finds it
there, or has it made.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seven_parts import programs
from seven_parts.process import measured

BENCHMARKS = Path(__file__).resolve().parents[1]
SAMPLE = BENCHMARKS.parent / "qlora_kit/assets/samples/query/valid.jsonl"


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
    rows_count: int

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
        path.write_text("\n".join(SAMPLE.read_text().splitlines()[: self.rows_count]) + "\n")
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
            shutil.rmtree(self.adapter(), ignore_errors=True)
            self.finetune(self.adapter())
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
