"""Damage real files of every kind, one mutation at a time, and run the command on what comes out.

Each mutant directory is judged by the real command (`generate` on a base or an adapter, for
tokenizers also `show_data`), in a process forked for it: it is accepted, or refused by an error of
the family that names the file. Anything else is a finding: another exception, a signal, more than
10 seconds of the processor, more than 4 GiB, a changed byte on the disk, a refusal that does not
say what of. The result has the table of files, kinds and outcomes, and how often each `raise` of
the modules that look at files was reached. 10,000 mutants take about 10 minutes on one core.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --mutant 1234   # one of them, with its traceback
"""

from __future__ import annotations

import collections
import functools
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ["HF_HUB_OFFLINE"] = "1"  # an adapter may name any base

import torch  # noqa: E402
from families import tree_hash  # noqa: E402
from mutations import kinds_of  # noqa: E402
from originals import FILES, make_originals  # noqa: E402
from raises import raises_of, sites_of  # noqa: E402
from record import make_parser, write_result  # noqa: E402

from qlora_kit.commands import generate, show_data  # noqa: E402
from qlora_kit.errors import AdapterError, ModelError, QloraKitError, error_line  # noqa: E402

TOKENIZERS = {"tokenizer", "tokenizer config", "chat template", "special tokens"}
TOKENIZERS |= {"stories' tokenizer", "sentencepiece"}
LOOKED_AT = (
    "base/safetensors_file",
    "base/checks",
    "base/contents",
    "base/json_file",
    "base/source",
    "base/meta_model",
    "base/architecture",
    "base/tokenizer",
    "base/bnb_checkpoint",
    "base/tensors",
    "base/load",
    "base/pattern",
    "lora/adapter",
    "lora/adapter_files",
)
NAMED = (ModelError, AdapterError)
"""Refusals that say which file or directory they are about; others may be about its content."""

SECONDS, HANGS_S = 10, 600
"""Of the processor; and of the clock, after which a mutant that waits is ended."""
MEMORY = 4 * 1024**3
ACCEPTED = "accepted"


@dataclass
class Judge:
    """Makes and judges mutants of `originals` in the folder `work`."""

    originals: Path
    work: Path
    seed: int

    @functools.cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Every file with every kind of damage, in an order that the seed draws."""
        found = [
            (file, kind)
            for file, (directory, name) in FILES.items()
            if (self.originals / directory).is_dir()
            for kind in kinds_of(self.originals / directory / name)
        ]
        random.Random(self.seed).shuffle(found)
        return found

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Of the undamaged directories."""
        return {path.name: tree_hash(path) for path in self.originals.iterdir() if path.is_dir()}

    def make(self, number: int) -> tuple[str, str] | None:
        """Put the mutant of that number into the folder; None where the damage finds no place."""
        file, kind = self.pairs[number % len(self.pairs)]
        directory, name = FILES[file]
        draw = random.Random(f"{self.seed} {number}")
        original = self.originals / directory
        for _ in range(5):
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.copytree(original, self.work / "mutant")
            path = self.work / "mutant" / name
            kinds_of(path)[kind](path, draw)
            if tree_hash(self.work / "mutant") != self.hashes[directory]:
                return file, kind
        return None

    def commands(self, file: str, number: int) -> list[tuple[Any, list[str]]]:
        """What is run on it."""
        mutant = str(self.work / "mutant")
        generated = ["--prompt", "a day", "--max_new_tokens", "2", "--dtype", "fp32"]
        if FILES[file][0] == "adapter":
            base = ["--model", str(self.originals / "plain")] if number % 2 else []
            return [(generate, [*generated, *base, "--adapter", mutant])]
        chat = ["--chat"] if file in TOKENIZERS else []
        commands = [(generate, [*generated, *chat, "--model", mutant])]
        if file in TOKENIZERS:
            rows = str(self.originals / "rows.jsonl")
            commands.append((show_data, ["--model", mutant, "--data", rows, "--rows", "1"]))
        return commands

    def run(self, number: int) -> dict[str, Any]:
        """Judge the mutant in the folder in a process of its own."""
        file = self.pairs[number % len(self.pairs)][0]
        before = tree_hash(self.work)
        reader, writer = os.pipe()
        began = time.perf_counter()
        pid = os.fork()
        if not pid:
            os.close(reader)
            self._child(self.commands(file, number), writer)
        os.close(writer)
        said = b""
        with os.fdopen(reader, "rb", 0) as pipe:
            while select.select([pipe], [], [], max(0, began + HANGS_S - time.perf_counter()))[0]:
                piece = pipe.read(2**16)
                if not piece:
                    break
                said += piece
            else:
                os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        answer: dict[str, Any] = {"outcome": "finding", "sites": []}
        answer["seconds"] = used.ru_utime + used.ru_stime
        if answer["seconds"] >= SECONDS or code == -signal.SIGKILL:
            answer["line"] = f"no answer in {answer['seconds']:g} s"
        elif code < 0:
            answer["line"] = f"ended by {signal.Signals(-code).name}"
        elif not said:
            answer["line"] = f"exit code {code} without an answer"
        else:
            answer |= json.loads(said)
        if tree_hash(self.work) != before:
            answer |= {"outcome": "finding", "line": f"the disk was changed; {answer['line']}"}
        return answer

    def _child(self, commands: list[tuple[Any, list[str]]], writer: int) -> None:
        try:
            os.chdir(self.originals)
            null = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(null, handle)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))
            os.write(writer, json.dumps(self._answer(commands)).encode())
        finally:
            os._exit(0)

    def _answer(self, commands: list[tuple[Any, list[str]]]) -> dict[str, Any]:
        error: BaseException | None = None
        try:
            for command, arguments in commands:
                # As the command has it before the last resort that calls an error a bug of ours.
                command.main.__wrapped__(arguments)
        except BaseException as caught:
            error = caught
        sites = sorted(sites_of(error))
        if error is None:
            return {"outcome": ACCEPTED, "line": "", "sites": sites}
        if not isinstance(error, QloraKitError):
            lines = traceback.format_exception(error)
            return {"outcome": "finding", "line": "".join(lines)[-1500:], "sites": sites}
        line = error_line(error)
        named = not isinstance(error, NAMED) or str(self.work) in str(error)
        outcome = type(error).__name__ if named and error.remedy and len(line) <= 400 else "finding"
        return {"outcome": outcome, "line": line, "sites": sites}


@dataclass
class Report:
    """What came of the mutants so far."""

    table: dict[str, Any] = field(default_factory=dict)
    sites: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    mutants: int = 0

    def add(self, number: int, file: str, kind: str, answer: dict[str, Any]) -> None:
        """Count one."""
        outcome = answer["outcome"]
        counts = self.table.setdefault(file, {}).setdefault(kind, collections.Counter())
        counts[outcome] += 1
        self.sites.update({(module, line) for module, line in answer["sites"]})
        self.slowest_s = max(self.slowest_s, answer["seconds"])
        self.mutants += 1
        if outcome == "finding":
            found = {"mutant": number, "file": file, "kind": kind, "line": answer["line"]}
            self.findings.append(found)
            print(json.dumps(found), flush=True)

    def result(self) -> dict[str, Any]:
        """For the file of results."""
        totals: collections.Counter[str] = collections.Counter()
        for kinds in self.table.values():
            for counts in kinds.values():
                totals.update(counts)
        raises = {
            module: {
                f"{line}: {text}": self.sites[module, line]
                for line, text in raises_of(module).items()
            }
            for module in LOOKED_AT
        }
        return {
            "mutants": self.mutants,
            "slowest_s": round(self.slowest_s, 2),
            "outcomes": dict(totals.most_common()),
            "findings": self.findings,
            "files": {
                file: {kind: dict(sorted(counts.items())) for kind, counts in sorted(kinds.items())}
                for file, kinds in sorted(self.table.items())
            },
            "raises": raises,
        }


def main() -> int:
    parser = make_parser(__doc__, "fuzz")
    parser.add_argument("--count", type=int, default=10_000, help="mutants")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--mutant", type=int, help="judge the one of this number, and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but its own
    gc.disable()  # what a fork looks at is copied
    with tempfile.TemporaryDirectory() as name:
        originals = Path(name) / "originals"
        originals.mkdir()
        make_originals(originals)
        judge, report = Judge(originals, Path(name) / "work", arguments.seed), Report()
        before, began, number = tree_hash(originals), time.perf_counter(), -1
        if arguments.mutant is not None:
            print(judge.make(arguments.mutant), judge.run(arguments.mutant)["line"])
            return 0
        while report.mutants < arguments.count:
            number += 1
            made = judge.make(number)
            if made is not None:
                report.add(number, *made, judge.run(number))
            if number % 500 == 499:
                print(f"{report.mutants} mutants, {len(report.findings)} findings", flush=True)
        took, used = time.perf_counter() - began, sum(os.times()[:4])
        assert tree_hash(originals) == before, "the originals were changed"
    times = {"seconds": round(took, 1), "processor_s": round(used, 1)}
    result = {"seed": arguments.seed, **times, **report.result()}
    print(write_result(arguments, result))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
