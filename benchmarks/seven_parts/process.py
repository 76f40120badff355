"""A process measured from outside: its peak resident set, wall and processor time, its output."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EVERY_S = 0.05


def measured(
    arguments: Sequence[str],
    environment: dict[str, str],
    kill_where: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run Python with `arguments` and wait for it: seconds and bytes of it, and its output.

    Once `kill_where` says so it gets SIGKILL. The peak is what the kernel calls VmHWM, read until
    the process ends: `ru_maxrss` of a child begins with what its parent had.
    """
    with tempfile.TemporaryFile("w+") as output:
        began, peak, killed = time.perf_counter(), 0, False
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            text=True,
        )
        while True:
            peak = max(peak, _peak_bytes(child.pid))
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            if not killed and kill_where():
                killed = True
                child.send_signal(signal.SIGKILL)
            time.sleep(EVERY_S)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if child.returncode and not killed:
        raise SystemExit(f"{' '.join(arguments)}\n{said}\nended with {child.returncode}")
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_rss": peak,
        "killed": killed,
        "output": said,
    }


def _peak_bytes(process: int) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(one for one in lines if one.startswith("VmHWM:")).split()[1]) * 1024
    return 0
