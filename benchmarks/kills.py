"""Kill a training run at every call that changes the disk, and at random times; resume each.

Every run goes on with `--resume_from_checkpoint auto` and must end in the same bytes as one that
nothing happened to. First each write, sync, rename and so on in turn, until no fault fires; a write
also in its middle. Then at times drawn uniformly over the steps. Last, every file of a checkpoint
is damaged in every way, which must be found, and `auto` must go back to the one before. About 10
minutes on 2 cores.

    OMP_NUM_THREADS=1 python benchmarks/kills.py
    OMP_NUM_THREADS=1 python benchmarks/kills.py --hard --random_only
"""

from __future__ import annotations

import collections
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from faults.harness import WRITES, Fault, Job, Server, damages, leftovers  # noqa: E402
from faults.harness import result_of as bytes_of  # noqa: E402
from record import make_parser, write_result  # noqa: E402

from qlora_kit.training.checkpoint import newest  # noqa: E402

HARD = (
    *("--bits", "8", "--lora_r", "64", "--lora_dropout", "0.1", "--optim", "adamw_8bit"),
    *("--packing", "--max_length", "24", "--gradient_accumulation_steps", "2", "--batch_size", "1"),
)
"""Everything at once that a resumed run must take up again; r is such that states have 8 bits."""
BEGINNING = "held-out loss before training"


def result_of(output: Path) -> dict[str, bytes]:
    """What must be the same: the result's bytes, and which other files there are."""
    names = {str(path.relative_to(output)): b"" for path in output.rglob("*") if path.is_file()}
    return {**names, **bytes_of(output)}


def resumes(job: Job, output: Path, reference: dict[str, bytes]) -> str:
    """Go on, compare, clean up; from where it went on."""
    inside_save = any(path.name.endswith((".tmp", ".old")) for path in output.glob(".*"))
    resumed = job.run(output, "--resume_from_checkpoint", "auto")
    if resumed.code or result_of(output) != reference or leftovers(output):
        raise RuntimeError(f"{output}: {leftovers(output)} {resumed.output}")
    shutil.rmtree(output)
    if "finished" in resumed.output:
        return "finished"
    if "starting from the start" in resumed.output:
        return "start, inside a save" if inside_save else "start"
    return "checkpoint, inside a save" if inside_save else "checkpoint"


def at_every_call(job: Job, directory: Path, reference: dict[str, bytes]) -> dict[str, object]:
    """Each call in turn, until the run ends without a fault."""
    whole = job.run(directory / "whole")
    kinds, ends = collections.Counter(whole.calls), collections.Counter[str]()
    points, at = 0, 0
    while True:
        at += 1
        write = at <= len(whole.calls) and whole.calls[at - 1] in WRITES
        for how in ("before", "inside") if write else ("before",):
            output = directory / f"{how}-{at}"
            killed = job.run(output, fault=Fault(at, how))
            if killed.code == 0:
                return {"points": points, "calls": dict(kinds), "went_on_from": dict(ends)}
            assert killed.code == -signal.SIGKILL, killed.output
            points += 1
            ends[resumes(job, output, reference)] += 1
        if at % 20 == 0:
            print(f"call {at}: {dict(ends)}", flush=True)


def at_random(
    job: Job, directory: Path, reference: dict[str, bytes], count: int, seed: int
) -> dict[str, object]:
    """`count` kills at times uniform over a run, from its first step to its end."""
    draw, ends = random.Random(seed), collections.Counter[str]()
    durations = []
    for number in range(5):
        running = job.start(directory / f"timed-{number}")
        running.wait_for(BEGINNING)
        began = time.perf_counter()
        assert running.wait().code == 0
        durations.append(time.perf_counter() - began)
    duration = sorted(durations)[2]
    struck = missed = 0
    while struck < count:
        output = directory / f"random-{struck + missed}"
        running = job.start(output)
        running.wait_for(BEGINNING)
        time.sleep(draw.random() * duration)
        running.signal(signal.SIGKILL)
        if running.wait().code == 0:  # it had ended: some runs are faster than the timed ones
            missed += 1
            assert result_of(output) == reference
            shutil.rmtree(output)
            continue
        struck += 1
        ends[resumes(job, output, reference)] += 1
        if struck % 5 == 0:
            print(f"random {struck}: {dict(ends)}", flush=True)
    inside = sum(found for how, found in ends.items() if "inside" in how)
    return {
        "kills": struck,
        "had_ended_before": missed,
        "seed": seed,
        "steps_s": round(duration, 3),
        "inside_a_save": inside,
        "went_on_from": dict(ends),
    }


def after_damage(job: Job, directory: Path, reference: dict[str, bytes]) -> dict[str, object]:
    """Damage each file of the newest checkpoint; how many damages there were, found and mended."""
    stopped, output = directory / "stopped", directory / "damaged"
    assert job.run(stopped, fault=Fault(1, path=".checkpoint-5.")).code == -signal.SIGKILL
    done, found, resumed = collections.Counter[str](), 0, 0
    for name in sorted(path.name for path in (stopped / "checkpoint-4").iterdir()):
        shutil.copytree(stopped, output)
        path, whole = output / "checkpoint-4" / name, (stopped / "checkpoint-4" / name).read_bytes()
        kinds = set()
        for how, damage in damages(path):
            damage()
            kind = how.split()[0]
            done[kind] += 1
            newer, _ = newest(output)
            found += newer is not None and newer.step == 3
            if kind not in kinds:  # one of each kind goes on to the end of the run
                kinds.add(kind)
                copy = shutil.copytree(output, directory / "resumed")
                outcome = job.run(copy, "--resume_from_checkpoint", "auto")
                said = "going back before checkpoint-4" in outcome.output
                resumed += outcome.code == 0 and said and result_of(copy) == reference
                shutil.rmtree(copy)
            path.write_bytes(whole)
        shutil.rmtree(output)
        done["files"] += 1
    return {**done, "found": found, "resumed_to_the_same_bytes": resumed}


def main() -> None:
    parser = make_parser(__doc__, "kills")
    parser.add_argument("--random", type=int, default=200, help="kills at random times")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--hard", action="store_true", help="8 bits, dropout, packs, accumulation and adamw_8bit"
    )
    parser.add_argument(
        "--random_only", action="store_true", help="no kill at each call, no damage"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory, server = Path(name), Server()
        job = Job(directory / "job", server).prepare()
        if arguments.hard:
            job = job.having(*HARD)
        first = job.run(directory / "reference")
        assert first.code == 0, first.output
        reference = result_of(directory / "reference")
        drawn = at_random(job, directory, reference, arguments.random, arguments.seed)
        result: dict[str, object] = {"random": drawn}
        if not arguments.random_only:
            result["every_call"] = at_every_call(job, directory, reference)
            result["damaged"] = after_damage(job, directory, reference)
        server.close()
    if arguments.hard:
        result["options"] = " ".join(HARD)
    print(write_result(arguments, result, "hard" if arguments.hard else ""))


if __name__ == "__main__":
    main()
