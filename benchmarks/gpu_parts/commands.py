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

STEPS, SMALL_STEPS = 120, 6


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
    if setting.cuda:
        run_command(
            found, "finetune, fp16", "finetune", "--output_dir", half, *train, "--dtype", "fp16"
        )
    _resume(setting, found, steps, device)
    sample = Path(__file__).resolve().parents[2] / "qlora_kit/assets/samples/extract/valid.jsonl"
    adapter = ["--adapter", first, *device]
    run_command(found, "evaluate", "evaluate", *adapter, "--data", sample)
    run_command(found, "generate", "generate", *adapter, "--prompt", "The road was long.")
    run_command(found, "export", "export", *adapter, "--output_dir", setting.scratch / "merged")
    failed = [name for name, one in found.items() if isinstance(one, dict) and one.get("code")]
    loss = (found.get("train") or {}).get("last_loss")
    return f"last loss {loss}, {f'failed: {failed}' if failed else 'all commands ended well'}"


def _resume(setting: Setting, found: dict[str, Any], steps: int, device: list[str]) -> None:
    """A run stopped at a checkpoint and gone on with, against one that was not stopped.

    The adapter's bytes are equal where the kernels are deterministic.
    """
    whole, parts = setting.scratch / "whole", setting.scratch / "parts"
    save = ["--save_steps", str(steps // 2), "--save_total_limit", "100", *device]
    short = ["--max_steps", str(steps)]
    run_command(found, "whole", "finetune", "--output_dir", whole, *short, *device)
    run_command(found, "with checkpoints", "finetune", "--output_dir", parts, *short, *save)
    kept = sorted(parts.glob("checkpoint*"))
    found["checkpoints"] = [path.name for path in kept]
    if not kept:
        return
    again = setting.scratch / "again"
    run_command(
        found,
        "resumed",
        "finetune",
        *("--output_dir", again, *short, *device, "--resume_from_checkpoint", kept[0]),
    )
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
        "out": out.getvalue()[-1500:],
        "error": error.getvalue()[-1500:],
    }


@contextlib.contextmanager
def _said() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield out, error
