"""The tests that only a card can run, `tests/cuda`, where pytest is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_parts.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
ALARM = 110
SAID = 20_000
"""Characters that are kept of what pytest prints: its end."""


def run(setting: Setting, found: dict[str, Any]) -> str:
    """One process with a time limit; what it said last."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed here"
    folder = ROOT / "tests" / "cuda"
    if not folder.exists():
        return f"{folder} is not here"
    setting.forget()
    # Without the project's own options, which ask for plugins.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT)]
    # With the name of each test, so that those that were done are known where time ran out.
    command += ["-v", "-ra", "--tb=short", "-p", "no:cacheprovider", "tests/cuda"]
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "QLORA_KIT_TEST_CUDA": "1", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=ALARM
        )
    except subprocess.TimeoutExpired as late:
        out = (late.stdout or b"").decode(errors="replace")
        found |= {"out": out[-SAID:], "counts": counts(out)}
        return f"not done after {ALARM} s: {found['counts']}"
    found["counts"] = counts(done.stdout)
    found |= {"code": done.returncode, "out": done.stdout[-SAID:], "error": done.stderr[-2000:]}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"pytest ended with {done.returncode}"


def counts(out: str) -> dict[str, int]:
    """How many tests ended how, as pytest prints them with their names."""
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    lines = [line for line in out.splitlines() if "::" in line and not line.startswith(words)]
    return {word: sum(f" {word}" in line for line in lines) for word in words}
