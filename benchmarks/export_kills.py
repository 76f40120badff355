"""Exports in every format, killed at each of their calls and at random moments, over an old export.

Every call through which a file or a directory changes is gone through, each write also with half of
it written: the folder is copied at each, for a kill leaves the disk as it is then. At random
moments (uniform over the time of the processor that an export takes) the kernel ends the process,
wherever it is. The next export looks at what was left: the old export is whole or the new one is,
and nothing lies beside it. Every tenth time it exports again, which gives the new one. Formats that
are not asked for keep their rows of an earlier result.

    OMP_NUM_THREADS=1 python benchmarks/export_kills.py
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from export_kills import ENDED, Exports  # noqa: E402
from gguf_models import save_model  # noqa: E402
from record import make_parser, provenance, write_result  # noqa: E402
from trained import save_trained, write_rows  # noqa: E402

from qlora_kit.config.export import FORMATS  # noqa: E402


def at_every_call(exports: Exports, form: str, folder: Path) -> dict[str, Any]:
    """What the disk holds at each call of one export."""
    place, copies = folder / "here" / "out", folder / "copies"
    exports.put_old(form, place)
    copies.mkdir(parents=True)
    calls = exports.copied(form, place, copies)
    states = sorted(path for path in copies.iterdir() if path.is_dir())
    found = [exports.found(form, state / "out") for state in states]
    whole = collections.Counter(one for one in found if one in ("old", "new"))
    faults = [
        f"{state.name}: {one}" for state, one in zip(states, found, strict=True) if one not in whole
    ]
    kinds = dict(collections.Counter(calls))
    return {"calls": kinds, "states": len(states), **whole, "faults": faults}


def at_random(exports: Exports, form: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """`count` kills at moments that are drawn, and exports after every tenth of them."""
    place, draw = folder / "random" / "out", random.Random(f"{form} {seed}")
    exports.put_old(form, place)
    duration = min(exports.run(form, place).seconds for _ in range(3))
    whole, faults, had_ended = collections.Counter[str](), list[str](), 0
    while sum(whole.values()) + len(faults) < count:
        exports.put_old(form, place)
        after = draw.random() * duration
        if exports.ended(form, place, after).code not in ENDED:
            had_ended += 1  # some exports are faster than the timed ones
            continue
        one = exports.found(form, place)
        if one in ("old", "new"):
            whole[one] += 1
        else:
            faults.append(f"after {after:.3f} s: {one}")
        if sum(whole.values()) % 10 == 0:
            again = exports.run(form, place)
            if again.code or exports.found(form, place) != "new":
                faults.append(f"after {after:.3f} s, the next: {again.err[-300:]}")
    return {"kills": count, **whole, "had_ended": had_ended, "faults": faults}


def main() -> int:
    parser = make_parser(__doc__, "export_kills")
    parser.add_argument("--random", type=int, default=50, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    given = parser.parse_args()
    path = given.results / f"{given.result}.json"
    table: dict[str, Any] = json.loads(path.read_text())["table"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_model(root / "base", "llama2")
        save_trained(root / "base", root / "adapter", bits=4, dtype="fp32")
        write_rows(root / "rows.jsonl", 4)
        exports, commit = Exports(root, given.formats), provenance()["commit"]
        for form in given.formats:
            folder = root / "killed" / form
            every = at_every_call(exports, form, folder)
            drawn = at_random(exports, form, folder, given.random, given.seed)
            table[form] = {"commit": commit, "every_call": every, "random": drawn}
            print(form, table[form], flush=True)
            shutil.rmtree(folder)
        exports.close()
    faults = [
        f"{form}: {one}"
        for form, row in table.items()
        for part in ("every_call", "random")
        for one in row[part]["faults"]
    ]
    print(write_result(given, {"table": table, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
