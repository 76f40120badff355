"""Values of every type at every option and every field of a model: none may be a bug of ours.

Texts, control characters, numbers of any size, lists, dates and more are put at one place of one
command at a time (`tests/support/anything.py` says where, and what breaks the contract). The result
counts exit codes by target and command, and lists what was found. Most cases end once options and
the first files were looked at; a share is run to its end. 5,000 cases take about 4 minutes on one
core.

    OMP_NUM_THREADS=1 python benchmarks/properties.py
    OMP_NUM_THREADS=1 python benchmarks/properties.py --target options --case 123   # one of them
"""

from __future__ import annotations

import collections
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a value may name any base

from any_fields import Fields  # noqa: E402
from anything import Answer, Case, Judge, Options, Target, make_shop, prepare_process  # noqa: E402
from record import make_parser, write_result  # noqa: E402

TARGETS: dict[str, tuple[Target, int]] = {
    # What is given values, and how many of each 5,000 cases.
    "options": (Options(whole=0.1), 5000),
    "fields": (Fields(), 2500),
}


class Report:
    """What came of the cases so far."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, collections.Counter[str]]] = {}
        self.places: dict[str, set[str]] = {}
        self.findings: list[dict[str, Any]] = []
        self.slowest_refusal_s = 0.0

    def add(self, target: str, number: int, case: Case, answer: Answer) -> None:
        """Count one."""
        counts = self.counts.setdefault(target, {}).setdefault(case.command, collections.Counter())
        counts[str(answer.code)] += 1
        self.places.setdefault(target, set()).add(case.place)
        if answer.code in (2, 3):
            self.slowest_refusal_s = max(self.slowest_refusal_s, answer.processor_s)
        if answer.finding is not None:
            found = {"target": target, "case": number, "place": case.place, "value": case.value}
            self.findings.append({**found, "finding": answer.finding})
            print(json.dumps(self.findings[-1], ensure_ascii=True), flush=True)

    def result(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "findings": self.findings,
            "slowest_refusal_processor_s": round(self.slowest_refusal_s, 2),
            "places": {target: len(found) for target, found in sorted(self.places.items())},
            "exit_codes": {
                target: {one: dict(sorted(codes.items())) for one, codes in sorted(found.items())}
                for target, found in sorted(self.counts.items())
            },
        }


def main() -> int:
    parser = make_parser(__doc__, "properties")
    parser.add_argument("--count", type=int, help="cases of each target, else as many as it has")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--target", choices=TARGETS, help="this one only")
    parser.add_argument("--case", type=int, help="run the one of this number, and print it")
    arguments = parser.parse_args()
    prepare_process()
    gc.disable()  # what a fork looks at is copied
    report, began = Report(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        shop = Path(name) / "shop"
        shop.mkdir()
        make_shop(shop)
        judge = Judge(shop, Path(name) / "work", arguments.seed)
        for called, (target, count) in TARGETS.items():
            if arguments.target not in (None, called):
                continue
            if arguments.case is not None:
                case = judge.case(target, arguments.case)
                print(case, judge.run(case), sep="\n")
                continue
            for number in range(arguments.count or count):
                case = judge.case(target, number)
                report.add(called, number, case, judge.run(case))
                if number % 500 == 499:
                    print(f"{called}: {number + 1}, {len(report.findings)} findings", flush=True)
    if arguments.case is not None:
        return 0
    took, used = time.perf_counter() - began, sum(os.times()[:4])
    times = {"seconds": round(took, 1), "processor_s": round(used, 1)}
    print(write_result(arguments, {"seed": arguments.seed, **times, **report.result()}))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
