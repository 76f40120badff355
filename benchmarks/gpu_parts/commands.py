"""The commands from end to end, as a user starts them: bf16, then fp16; resumed, exported."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts.setting import Setting
from qlora_kit.commands.main import main

STEPS, SMALL_STEPS, FEW_STEPS = 120, 6, 12
PLAIN = ("--sample_prompts", "0", "--compare_bits", "false")
"""Of the quickstart without what it shows beside the training."""


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Each command with its exit code, what it said and what it took; a later one runs anyway."""
    device = ["--device", setting.device.type]
    steps = SMALL_STEPS if setting.small else STEPS
    first, half = setting.scratch / "quickstart", setting.scratch / "half"
    train = ["--max_steps", str(steps), "--overwrite", *device]
    run_command(found, "finetune", "finetune", "--output_dir", first, *train)
    if (first / "run.json").exists():
        record = json.loads((first / "run.json").read_text())
        found["memory"] = record.get("memory")
        found["train"] = record.get("train")
        found["eval"] = record.get("eval")
    few = ["--max_steps", str(min(steps, FEW_STEPS)), *PLAIN, *device]
    if setting.cuda:
        half_options = ("--output_dir", half, *few, "--dtype", "fp16")
        run_command(found, "finetune, fp16", "finetune", *half_options)
    _resume(setting, found, few)
    sample = Path(__file__).resolve().parents[2] / "qlora_kit/assets/samples/extract/valid.jsonl"
    adapter = ["--adapter", first, *device]
    run_command(found, "evaluate", "evaluate", *adapter, "--data", sample)
    run_command(found, "generate", "generate", *adapter, "--prompt", "The road was long.")
    run_command(found, "export", "export", *adapter, "--output_dir", setting.scratch / "merged")
    failed = [name for name, one in found.items() if isinstance(one, dict) and one.get("code")]
    loss = (found.get("train") or {}).get("last_loss")
    return f"last loss {loss}, {f'failed: {failed}' if failed else 'all commands ended well'}"


def _resume(setting: Setting, found: dict[str, Any], few: list[str]) -> None:
    """A run stopped at a checkpoint and gone on with, against the one that was not stopped.

    The adapter's bytes are equal where the kernels are deterministic.
    """
    whole, again = setting.scratch / "whole", setting.scratch / "again"
    save = ("--save_steps", str(FEW_STEPS // 4), "--save_total_limit", "100")
    run_command(found, "whole", "finetune", "--output_dir", whole, *few, *save)
    kept = sorted(whole.glob("checkpoint*"))
    found["checkpoints"] = [path.name for path in kept]
    if not kept:
        return
    resume = ("--resume_from_checkpoint", kept[0])
    run_command(found, "resumed", "finetune", "--output_dir", again, *few, *resume)
    files = [path / "adapter_model.safetensors" for path in (whole, again)]
    if all(file.exists() for file in files):
        found["resumed equals whole"] = files[0].read_bytes() == files[1].read_bytes()


def run_command(found: dict[str, Any], name: str, command: str, *arguments: Any) -> None:
    """Run a command in this process; its exit code, seconds and last words under a name."""
    began = time.perf_counter()
    with _said() as (out, error):
        try:
            code = main([command, *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
    found[name] = {
        "code": code,
        "seconds": time.perf_counter() - began,
        "out": out.getvalue()[-4000:],
        "error": error.getvalue()[-4000:],
    }


@contextlib.contextmanager
def _said() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error
