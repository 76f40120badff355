"""A 7 B Llama on a CPU, from plan to answers: peak memory and time of every step in 4 and 8 bits.

A checkpoint of Llama-2-7B's shape with random weights (13.5 GB) is written as one file and in
shards. Each step is a process of its own, measured from outside: planned, loaded from both, loaded
into the base cache and out of it, trained for a few packed rows of 128 tokens with a checkpoint in
the middle, killed behind it and resumed, merged and exported to 16 bits and read back, evaluated,
and answered with. The result is written after every step. `--only` runs some of them; those of
this commit that are in the result stay there.

    python benchmarks/seven_billion.py --work DIR
    python benchmarks/seven_billion.py --work DIR --bits 4 --only "load, shards" finetune
    python benchmarks/seven_billion.py --page

Needs 24 GiB of memory, 45 GB of disk and QLORA_KIT_DATA (a tokenizer, and the shape unless one is
given). `--page` writes the table of the result into README.md, and does nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from record import make_parser, provenance, write_result
from seven_parts.page import write_page
from seven_parts.steps import STEPS, Run


def main() -> None:
    parser = make_parser(__doc__, "seven_billion")
    data = Path(os.environ.get("QLORA_KIT_DATA", ""))
    parser.add_argument("--config", type=Path, default=data / "configs/llama2_7b.json")
    parser.add_argument("--tokenizer", type=Path, default=data / "models/stories260K")
    parser.add_argument("--work", type=Path, default=Path("seven_billion"), help="%(default)s")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
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
        rows = measured["rows"]
    for bits in given.bits:
        run = Run(
            *(given.config.resolve(), given.tokenizer.resolve(), work, bits),
            *(given.shards, given.steps, given.length),
        )
        for name in given.only:
            row = rows.setdefault(str(bits), {})[name] = STEPS[name](run)
            print(f"{bits} bits, {name}: {json.dumps(row)}", flush=True)
            shape = {"shape": given.config.stem, "shards": given.shards, "length": given.length}
            path = write_result(given, {**shape, "rows": rows})
    print(path)
    if given.clear:
        shutil.rmtree(work)


def read_result(given: Any) -> dict[str, Any]:
    """The result as it is; empty where there is none."""
    path = given.results / f"{given.result}.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
