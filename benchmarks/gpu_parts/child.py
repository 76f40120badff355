"""Parts that need a process of their own: another environment, or a cap on memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_parts.setting import Setting

RUNNER = Path(__file__).resolve().parents[1] / "gpu.py"


def in_child(
    setting: Setting,
    found: dict[str, Any],
    module: str,
    seconds: int,
    environment: Mapping[str, str | None],
) -> str:
    """The line of `child(setting, found)` of a module, run in a process with other variables.

    None takes a variable away. What it found is in `found`, whether it ended well or not.
    Errors: `RuntimeError` where it did not.
    """
    result = setting.scratch / f"{module}.json"
    command = [sys.executable, str(RUNNER), "--child", module, "--output", str(result)]
    command += ["--device", setting.device.type, *(["--small"] if setting.small else [])]
    command += ["--prepared", str(setting.prepared)] if setting.prepared else []
    variables = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name in (name for name, value in environment.items() if value is None):
        variables.pop(name, None)
    process = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # in the group of this process: what ends that ends it, too
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if result.exists():
            found |= json.loads(result.read_text())
    if process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode}: {said[-1500:]}")
    line: str = found.pop("line")
    return line
