"""A 7 B Llama on a CPU, from plan to answers: peak memory and time of every step in 4 and 8 bits.

A checkpoint of Llama-2-7B's shape with random weights (13.5 GB) is written as one file and in
shards, which stay in `--work` for another run. Each step is a process of its own, measured from
outside: planned, loaded from both, loaded into the base cache and out of it, trained for packed
rows with a checkpoint in the middle, killed behind it and resumed, merged and exported to 16 bits
and read back, evaluated, and answered with. The result is written after every step, with what is
asked of it (`seven_parts/limits.py`) beside what was found; what fails is in it, and the rest goes
on. A limit that is not held ends it with an error. `--only` runs some steps; those of this commit
that are in the result stay there.

    python benchmarks/seven_billion.py --work DIR
    python benchmarks/seven_billion.py --work DIR --bits 4 --only "load, shards" finetune
    python benchmarks/seven_billion.py --page

Needs 24 GiB of memory, 55 GB of disk and QLORA_KIT_DATA (a tokenizer, and the shape unless one is
given). `--page` writes the tables of the result into README.md, and does nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from record import make_parser, provenance, write_result
from seven_parts.limits import limits
from seven_parts.page import write_page
from seven_parts.run import Run
from seven_parts.steps import STEPS

NUMBERS = ("shards", "steps", "length", "rows")


def main() -> None:
    parser = make_parser(__doc__, "seven_billion")
    data = Path(os.environ.get("QLORA_KIT_DATA", ""))
    parser.add_argument("--config", type=Path, default=data / "configs/llama2_7b.json")
    parser.add_argument("--tokenizer", type=Path, default=data / "models/stories260K")
    parser.add_argument("--work", type=Path, default=Path("seven_billion"), help="%(default)s")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a pack")
    parser.add_argument("--rows", type=int, default=4, help="that are evaluated and verified on")
    parser.add_argument("--clear", action="store_true", help="delete --work at the end")
    parser.add_argument("--page", action="store_true", help="the result's table into README.md")
    given = parser.parse_args()
    if given.page:
        write_page(read_result(given))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    measured = read_result(given)
    rows: dict[str, dict[str, Any]] = {}
    if measured.get("measured", {}).get("commit") == provenance()["commit"]:
        rows = measured.get("rows", {})
    numbers = given.shards, given.steps, given.length, given.rows
    for bits in given.bits:
        run = Run(given.config.resolve(), given.tokenizer.resolve(), work, bits, *numbers)
        for name in given.only:
            steps = rows.setdefault(str(bits), {})
            row = steps[name] = measured_step(name, run)
            rows[str(bits)] = {one: steps[one] for one in STEPS if one in steps}
            print(f"{bits} bits, {name}: {json.dumps(row)}", flush=True)
            found = {width: limits(steps, int(width)) for width, steps in rows.items()}
            shape = {"shape": given.config.stem, **dict(zip(NUMBERS, numbers, strict=True))}
            path = write_result(given, {**shape, "limits": found, "rows": rows})
    print(path)
    if given.clear:
        shutil.rmtree(work)
    missed = [f"{bits} bits: {one}" for bits in found for one in found[bits] if not one["held"]]
    if missed:
        raise SystemExit("\n".join(["not held:", *missed]))


def measured_step(name: str, run: Run) -> dict[str, Any]:
    """The row of a step; of one that fails what it said last, and the others are measured."""
    try:
        return STEPS[name](run)
    except (SystemExit, OSError, ValueError, KeyError) as error:
        return {"failed": f"{type(error).__name__}: {str(error)[-2000:]}"}


def read_result(given: Any) -> dict[str, Any]:
    """The result as it is; empty where there is none."""
    path = given.results / f"{given.result}.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
