"""Each signal in each phase of a run: how it leaves, what it keeps, and whether it goes on.

In the first two phases, the start and the import of torch, each case is a process of its own and
the moment is drawn. In the others a forked run sends itself the signal at the place, and is then
resumed: its files must be those of a run that nothing happened to. Last, signals at random times.
About 4 minutes on 2 cores.

    OMP_NUM_THREADS=1 python benchmarks/signals.py
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from faults.harness import Job, Server, leftovers, result_of  # noqa: E402
from faults.injections import PHASES  # noqa: E402
from record import make_parser, write_result  # noqa: E402

from qlora_kit.process.signals import SIGNALS  # noqa: E402
from qlora_kit.training.checkpoint import newest  # noqa: E402

MAIN = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "print('started', flush=True)\n"
    "from qlora_kit.commands.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)
KEPT = {"step": 2, "save": 2, "last-evaluation": 5}
"""The least step of the checkpoint that a phase keeps, of 5; nothing is kept before."""
IMPORT_S = 1.0
"""Of the time that torch takes to import at least, in which a moment is drawn."""


def files_of(output: Path) -> dict[str, bytes]:
    """What must be the same: the adapter's bytes, and which other files there are."""
    names = {str(path.relative_to(output)): b"" for path in output.rglob("*") if path.is_file()}
    return {**names, **result_of(output)}


def early(job: Job, output: Path, number: signal.Signals, torch: bool, draw: random.Random) -> str:
    """A signal at the start, or while torch is imported; what did not hold, or `held`."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "finetune", *job.command(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in SIGNALS],
    )
    assert process.stdout
    process.stdout.readline()
    if torch:
        until = time.monotonic() + 60
        while "/torch/" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(draw.random() * IMPORT_S)
    else:
        time.sleep(draw.random() * 0.1)
    os.kill(process.pid, number)
    _, said = process.communicate()
    # At the start Python itself has no handler yet, and there is nothing to keep.
    codes = (128 + number,) if torch else (128 + number, -number)
    if process.returncode not in codes:
        return f"exit {process.returncode}: {said[-300:]}"
    if output.exists():
        return "files are left"
    return "held"


def resumed(job: Job, output: Path, wanted: dict[str, bytes]) -> str:
    """Go on and compare; what did not hold, or `held`."""
    outcome = job.run(output, "--resume_from_checkpoint", "auto")
    if outcome.code:
        return f"resumed with exit {outcome.code}: {outcome.output[-300:]}"
    if files_of(output) != wanted:
        return f"other files or bytes: {sorted(files_of(output))}"
    return f"leftovers {leftovers(output)}" if leftovers(output) else "held"


def inside(
    job: Job, output: Path, number: signal.Signals, phase: str, wanted: dict[str, bytes]
) -> str:
    """A signal inside a run; what did not hold, or `held`."""
    stopped = job.run(output, inject=f"signal_in {phase} {number.name}")
    code = 0 if phase == "writing" else 128 + number
    if stopped.code != code:
        return f"exit {stopped.code} instead of {code}: {stopped.output[-300:]}"
    if phase in KEPT:
        found, notes = newest(output)
        if found is None or found.step < KEPT[phase] or notes:
            return f"kept {found and found.step}, {notes}"
    elif phase != "writing" and output.exists():
        return "files are left"
    return resumed(job, output, wanted)


def at_random(
    job: Job, directory: Path, wanted: dict[str, bytes], count: int, draw: random.Random
) -> dict[str, int]:
    """Signals at times drawn over a run, several of them until it ends."""
    ends = collections.Counter[str]()
    began = time.monotonic()
    assert job.run(directory / "timed").code == 0
    duration = time.monotonic() - began
    for number in range(count):
        output, code = directory / f"random-{number}", -1
        while code:
            kind = draw.choice(SIGNALS)
            running = job.start(output, "--resume_from_checkpoint", "auto")
            time.sleep(draw.random() * duration)
            running.signal(kind)
            outcome = running.wait()
            code = outcome.code
            # Where nothing listens yet, or no more, a signal ends the process as it always did.
            if code not in (0, 128 + kind, -kind):
                ends[f"exit {code}: {outcome.output[-300:]}"] += 1
                break
            ends[f"exit {code}" if code >= 0 else "by the signal itself"] += 1
        else:
            ends["ended in the same bytes" if files_of(output) == wanted else "OTHER BYTES"] += 1
        shutil.rmtree(output, ignore_errors=True)
    return dict(ends)


def main() -> None:
    parser = make_parser(__doc__, "signals")
    parser.add_argument("--early", type=int, default=2, help="processes for each early case")
    parser.add_argument("--random", type=int, default=30, help="runs with signals at random times")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory, server = Path(name), Server()
        job = Job(directory / "job", server).prepare().having("--save_minutes", "0")
        assert job.run(directory / "reference").code == 0
        wanted = files_of(directory / "reference")
        drawn = at_random(job, directory, wanted, arguments.random, draw)
        print(drawn, flush=True)
        for number in SIGNALS:
            row = table.setdefault(number.name, {})
            for phase in PHASES:
                output = directory / f"{number.name}-{phase}"
                row[phase] = inside(job, output, number, phase, wanted)
            for phase, torch in (("start", False), ("importing torch", True)):
                found = {
                    early(job, directory / f"{number.name}-{at}", number, torch, draw)
                    for at in range(arguments.early)
                }
                row[phase] = "; ".join(sorted(found - {"held"})) or "held"
            print(number.name, row, flush=True)
        server.close()
    tried = sum(len(row) for row in table.values())
    held = sum(fault == "held" for row in table.values() for fault in row.values())
    print(f"{tried} tried, {held} held")
    result = {"tried": tried, "held": held, "table": table, "at_random": drawn}
    print(write_result(arguments, {**result, "early_processes": arguments.early}))


if __name__ == "__main__":
    main()
