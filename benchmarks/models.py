"""Every model_type that transformers maps to a causal language model: works, or refused and why.

Of each a tiny random model is made (`tests/support/any_model.py`) and taken through the commands in
4, 8 and 16 bits: trained, saved, read by PEFT, exported, read by plain transformers, with the laws
of `tests/support/model_laws.py` in between. Each type has a process of its own, with limits on time
and memory: one that crashes or hangs is a row of the result and not its end. The result is also
written as a page. All types take about 10 minutes on two cores.

    OMP_NUM_THREADS=1 python benchmarks/models.py
    OMP_NUM_THREADS=1 python benchmarks/models.py --types cohere,olmo2   # some, printed alone
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ["HF_HUB_OFFLINE"] = "1"

from models_page import summary, write_page  # noqa: E402
from record import make_parser, write_result  # noqa: E402

BITS = (4, 8, 16)
MEMORY_LIMIT, PROCESSOR_S, WALL_S = 10 * 1024**3, 120, 600
PAGE = ROOT / "docs" / "models.md"


@dataclass
class Child:
    """A process that is at one type."""

    kind: str
    pid: int
    began: float
    row: Path


def run_all(
    kinds: Sequence[str], bits: Sequence[int], processes: int, root: Path
) -> dict[str, dict[str, Any]]:
    """The row of every type, each made in a process of its own."""
    left, running, rows = list(kinds), list[Child](), dict[str, dict[str, Any]]()
    while left or running:
        while left and len(running) < processes:
            running.append(start(left.pop(0), bits, root))
        for child in list(running):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid and time.monotonic() - child.began > WALL_S:
                os.killpg(child.pid, signal.SIGKILL)
            if pid:
                running.remove(child)
                rows[child.kind] = ended(child, status)
                print(f"{len(rows)}/{len(kinds)} {child.kind}: {summary(rows[child.kind])}")
                sys.stdout.flush()
        time.sleep(0.02)
    return rows


def start(kind: str, bits: Sequence[int], root: Path) -> Child:
    """Fork a process that makes the row of a type and writes it."""
    row = root / f"{kind}.json"
    pid = os.fork()
    if pid:
        return Child(kind, pid, time.monotonic(), row)
    code = 1
    try:
        os.setsid()  # what a type starts ends with it
        from models_chain import make_row

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S + 1))
        log = os.open(root / f"{kind}.log", os.O_CREAT | os.O_WRONLY)
        for handle in (1, 2):
            os.dup2(log, handle)
        make_row(kind, bits, root / kind, row)
        code = 0
    finally:
        os._exit(code)


def ended(child: Child, status: int) -> dict[str, Any]:
    """What a process wrote, and how it ended where it did not do so by itself."""
    row: dict[str, Any] = json.loads(child.row.read_text()) if child.row.exists() else {}
    if status:
        code = os.waitstatus_to_exitcode(status)
        row["crash"] = f"the process ended with {code} after {row.get('at', 'nothing')}"
    row.pop("at", None)
    return row


def main() -> int:
    parser = make_parser(__doc__, "models")
    parser.add_argument("--types", help="these only, separated by commas; written with --add alone")
    parser.add_argument("--bits", default="4,8,16", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (%(default)s)")
    parser.add_argument("--add", action="store_true", help="add to the last result, and write it")
    parser.add_argument("--again", action="store_true", help="only the page, of the last result")
    given = parser.parse_args()
    if given.again:
        write_page(given.page, json.loads((given.results / f"{given.result}.json").read_text()))
        return 0
    from any_model import MODEL_TYPES
    from models_chain import prepare

    chosen = given.types.split(",") if given.types else list(MODEL_TYPES)
    bits = tuple(map(int, given.bits.split(",")))
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        gc.freeze()  # what a fork looks at is copied
        rows = run_all(chosen, bits, given.processes, Path(name))
    if given.types and not given.add:
        print(json.dumps(rows, indent=1))
        return 0
    last = given.results / f"{given.result}.json"
    earlier: list[Any] = []
    if given.add:
        before = json.loads(last.read_text())
        earlier = [*before.get("earlier", []), before["measured"]]
        types = before["types"]
        rows = {kind: types.get(kind, {}) | rows.get(kind, {}) for kind in {*types, *rows}}
    ordered = {kind: rows[kind] for kind in sorted(rows)}
    written = write_result(given, {"earlier": earlier, "types": ordered})
    write_page(given.page, json.loads(written.read_text()))
    print(written, given.page, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
