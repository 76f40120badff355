"""All that a card has to show, in one command of some minutes.

    python benchmarks/gpu_prepare.py --output prepared             # anywhere; no card is needed
    python benchmarks/gpu.py --prepared prepared --output found    # where the card is
    python benchmarks/gpu.py --device cpu --small --output found   # the same on a CPU, small

The parts (`gpu_parts/`) run one after another in one process, the most valuable first; those that
no longer fit into the minutes are left out, and the result says which. It is written after every
part. A part has a time limit. One that raises, or takes too long, is noted, and the next one
begins; where the process itself ends or hangs, or no longer reaches the card, another one goes on
with the parts that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Part, chosen

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15
"""Seconds after its limit until a part that does not answer is ended with its process."""
AGAIN = 5
"""Seconds until a limit is said again to what did not end at it."""
LOST = 3
"""The exit code of a process that no longer reaches the card."""
NO_CARD = 4
"""The exit code where there is none."""
RESULT = "gpu"


class TooLongError(BaseException):
    """A part that has taken its limit; no error of the package, which a command would report."""


def main() -> int:
    given = parse()
    if given.child:
        return child(given)
    if given.worker:
        return work(given)
    return supervise(given)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--prepared", type=Path, help="folder that gpu_prepare.py made")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (%(default)s)")
    parser.add_argument(
        "--parts",
        help="numbers or names, with commas between them: "
        + ", ".join(f"{one.number} {one.name}" for one in sorted(PARTS, key=lambda p: p.number)),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models, for a CPU")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        given.chosen = chosen(given.parts)
    except ValueError as error:
        parser.error(str(error))
    return given


def supervise(given: argparse.Namespace) -> int:
    """Start the process of the parts, and another one as long as it ends before they are done."""
    end = time.time() + 60 * given.minutes
    given.output.mkdir(parents=True, exist_ok=True)
    result = given.output / f"{RESULT}.json"
    result.unlink(missing_ok=True)
    left = list(given.chosen)
    while left and time.time() < end:
        before = len(left)
        code = watch(start(given, left, end), result, end)
        found = read(result)
        done = {*found.get("parts", {}), *found.get("left_out", {})}
        left = [part for part in left if part.name not in done]
        if code == NO_CARD:
            return code
        if not left or (len(left) == before and not code):
            break
        if len(left) == before:
            print(f"the process of the parts ended with {code} before its first part", flush=True)
            return 1
    return 0 if result.exists() else 1


def start(given: argparse.Namespace, left: list[Part], end: float) -> subprocess.Popen[bytes]:
    """The process of some parts, with what was prepared within its reach."""
    names = ",".join(part.name for part in left)
    command = [sys.executable, __file__, "--worker", str(end), "--parts", names]
    command += ["--output", str(given.output), "--device", given.device]
    command += ["--prepared", str(given.prepared)] if given.prepared else []
    command += ["--small"] if given.small else []
    paths = [str(ROOT), *missing_packages(given.prepared), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # What cards without cuDNN's attention take; part 12 is without it.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
    }
    if given.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(command, env=environment, start_new_session=True)


def missing_packages(prepared: Path | None) -> list[str]:
    """Folders of the prepared packages that this Python does not have."""
    if prepared is None or not (prepared / "packages").exists():
        return []
    folders = sorted(path for path in (prepared / "packages").iterdir() if path.is_dir())
    return [str(path.resolve()) for path in folders if importlib.util.find_spec(path.name) is None]


def watch(process: subprocess.Popen[bytes], result: Path, end: float) -> int:
    """Wait for the process of the parts; end it where a part does not answer. Its exit code."""
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                running = read(result).get("running")
                late = running is not None and time.time() > running["until"] + GRACE
                if late or time.time() > end + GRACE:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        mark_ended(result, process.returncode)


def mark_ended(result: Path, code: int | None) -> None:
    """Note a part in the middle of which its process ended."""
    found = read(result)
    if (running := found.pop("running", None)) is not None:
        name = running["name"]
        found["parts"][name] = {**running["found"], "failed": f"its process ended with {code}"}
        write(result, found)
        print(f"{name}: its process ended with {code}", flush=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one go: whoever ends this process finds the old one or the new one."""
    path.with_suffix(".new").write_text(json.dumps(content, indent=1, default=str) + "\n")
    path.with_suffix(".new").replace(path)


def work(given: argparse.Namespace) -> int:
    """Run parts one after another, as long as there is time."""
    import torch
    from record import write_result

    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; run this where the card is, or with --device cpu --small")
        return NO_CARD
    result = given.output / f"{RESULT}.json"
    if not result.exists():
        given.results, given.result = given.output, RESULT
        kind = {"device": given.device, "small": given.small, "minutes": given.minutes}
        write_result(given, {**kind, "parts": {}, "left_out": {}})
    found = read(result)
    with tempfile.TemporaryDirectory() as scratch:
        setting = make_setting(given, Path(scratch))
        for part in given.chosen:
            left = given.worker - time.time()
            if left < min(part.seconds, 60 * given.minutes):
                found["left_out"][part.name] = f"{left:.0f} s left, {part.seconds} expected"
                write(result, found)
                print(f"{part.number} {part.name}: left out, {left:.0f} s left", flush=True)
                continue
            one: dict[str, Any] = {}
            until = time.time() + min(part.limit, left)
            found["running"] = {"name": part.name, "until": until, "found": {}}
            write(result, found)
            run_part(part, setting, one, until)
            found["running"]["found"] = one
            write(result, found)
            lost = "failed" in one and not reaches(setting)
            del found["running"]
            found["parts"][part.name] = one
            write(result, found)
            print(f"{part.number} {part.name} ({one['seconds']:.0f} s): {one['line']}", flush=True)
            if lost:
                return LOST
    return 0


def run_part(part: Part, setting: Any, found: dict[str, Any], until: float) -> None:
    """One part within its time; what it raises is noted beside what it found."""
    began = time.perf_counter()
    try:
        with alarm(until - time.time()):
            found["line"] = importlib.import_module(f"gpu_parts.{part.name}").run(setting, found)
    except (Exception, SystemExit, TooLongError) as error:
        found["failed"] = "".join(traceback.format_exception(error))[-4000:]
        lines = f"{type(error).__name__}: {error}".splitlines()
        found["line"] = f"failed: {lines[0][:200]}"
        # Its frames hold tensors.
        error.__traceback__ = None
    found["seconds"] = time.perf_counter() - began
    found["shows"] = part.shows


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Inside, `TooLongError` is raised after so many seconds."""

    def ring(*_: Any) -> None:
        raise TooLongError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_setting(given: argparse.Namespace, scratch: Path) -> Any:
    """What the parts are given."""
    import torch
    from gpu_parts.setting import Setting

    return Setting(torch.device(given.device), given.small, given.prepared, scratch)


def reaches(setting: Any) -> bool:
    """Whether the card still answers: after some errors it does not, in this process."""
    import gc

    import torch

    gc.collect()
    try:
        setting.wait()
        torch.ones(4, device=setting.device).sum().item()
        if setting.cuda:
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def child(given: argparse.Namespace) -> int:
    """A part's own process; writes what it found to the file that is named."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        setting = make_setting(given, Path(scratch))
        try:
            module = importlib.import_module(f"gpu_parts.{given.child}")
            found["line"] = module.child(setting, found)
        finally:
            write(given.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
