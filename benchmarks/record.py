"""What every benchmark result carries: machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qlora_kit.run.metrics import versions

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: the result below where and how it was measured."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"measured": provenance(), **result}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def provenance() -> dict[str, Any]:
    """Where, when, with what and by which command this process measures."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "gpu": _gpu()},
        "versions": versions() | _peer_versions(),
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(_named, sys.argv[1:])]),
    }


def _named(argument: str) -> str:
    """An argument; of an absolute path its name alone, for the rest is this machine's."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _peer_versions() -> dict[str, str]:
    """What the package does without, and is compared with."""
    try:
        return {"peft": importlib.metadata.version("peft")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
