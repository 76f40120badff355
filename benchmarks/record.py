"""The options that every benchmark has, and what its result carries: machine, versions, commit."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def make_parser(documentation: str, result: str) -> argparse.ArgumentParser:
    """A parser with `--result` and `--results`: name and folder of what the benchmark writes."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--result", default=result, help="name of the result (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser


def write_result(given: argparse.Namespace, result: dict[str, Any], part: str = "") -> Path:
    """Write a result below where and how it was measured, into the file that was asked for.

    `part` is the end of its name where a benchmark writes several.
    """
    path: Path = given.results / f"{given.result}{part and '_'}{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"measured": provenance(), **result}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def provenance() -> dict[str, Any]:
    """Where, when, with what and by which command this process measures."""
    # Here: importing a benchmark must not import torch, whose memory its child processes inherit.
    from qlora_kit.run.metrics import versions

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "gpu": _gpu()},
        "versions": versions() | _peer_versions(),
        "commit": _commit(),
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


def _commit() -> str | None:
    """The commit that runs, `+changes` where files differ from it; None where git cannot say."""
    commit = _git("rev-parse", "HEAD")
    # What a benchmark has written of itself so far changes nothing that it measures.
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return commit + ("+changes" if changed else "") if commit else None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""  # no such program
    return done.stdout.strip()
