"""Publishing, as a table: every place an export or a page may be asked to go to, and kills.

In a mount namespace of its own (root is needed; without it what needs a mount is skipped, and said)
each case runs a command in a forked process and looks at its exit code and at what is on disk.
Then an export is killed after every call that changes a directory: over an old one beside it, into
a volume, and into the working directory. After each kill the old or the new export is whole once
the next export has looked, and the next one works and leaves nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from families import save_checkpoint  # noqa: E402
from publishing_parts.meanwhile import cache_cases, meanwhile_cases  # noqa: E402
from publishing_parts.pages import overwrite_cases, page_cases  # noqa: E402
from publishing_parts.places import place_cases  # noqa: E402
from publishing_parts.shop import (  # noqa: E402
    CASES,
    LIBC,
    NAMESPACE,
    PRIVATE,
    Shop,
    command,
    mounted,
    run,
    tree,
)
from record import make_parser, write_result  # noqa: E402
from trained import save_trained, write_rows  # noqa: E402

from qlora_kit.files.publish import mend  # noqa: E402


def kills(shop: Shop, kind: str, folder: Path) -> dict[str, Any]:
    """Kill an export after each of its calls that change a directory, over an old export."""
    with contextlib.ExitStack() as held:
        place = folder / "out"
        if kind == "a volume":
            held.enter_context(mounted(place, options=b"size=64m"))
        place.mkdir(exist_ok=True)
        how = {"folder": place} if kind == "the working directory" else {}
        where = "." if how else str(place)
        # `.` may not be replaced with --overwrite: there the place is empty before.
        more = () if how else ("--overwrite",)
        run(shop.export(folder / "ref_new"))
        run(shop.export(folder / "ref_old", dtype="fp32"))
        new, old = tree(folder / "ref_new"), {} if how else tree(folder / "ref_old")
        counts = {"kills": 0, "old": 0, "new": 0, "faults": list[str]()}
        for number in range(1, 10_000):
            for left in list(place.iterdir()):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not how:
                shutil.copytree(folder / "ref_old", place, dirs_exist_ok=True)
            code, line = run(shop.export(where, *more), kill_after=number, **how)
            if code == 0:
                return counts
            counts["kills"] += 1
            if code != -signal.SIGKILL:
                counts["faults"].append(f"call {number}: exit {code}: {line}")
                continue
            mend(place)
            now = tree(place)
            which = "new" if now == new else "old" if now == old else ""
            if number % 20 == 0:
                print(f"{kind}: {number} kills", flush=True)
            if which:
                counts[which] += 1
            else:
                counts["faults"].append(f"call {number}: neither is whole: {sorted(now)}")
            if now == new and how:
                continue  # it is there, and the working directory's is not replaced
            code, line = run(shop.export(where, *more), **how)
            names = set(os.listdir(folder)) - {"out", "ref_new", "ref_old"}
            if code or tree(place) != new or names:
                counts["faults"].append(f"call {number}: the next: exit {code}: {line} {names}")
    raise AssertionError


def main() -> int:
    parser = make_parser(__doc__, "publishing")
    parser.add_argument("--case", help="the cases whose name has this text, and no kills")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    namespace = LIBC.unshare(NAMESPACE) == 0 and LIBC.mount(b"none", b"/", None, PRIVATE, None) == 0
    for add in (page_cases, overwrite_cases, place_cases, meanwhile_cases, cache_cases):
        add()
    table: dict[str, dict[str, Any]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        os.umask(0o022)
        shop = Shop(root / "shop", namespace)
        save_checkpoint(shop.root / "base")
        save_trained(shop.root / "base", shop.root / "adapter", bits=4, dtype="fp32")
        write_rows(shop.root / "rows.jsonl")
        for path in shop.root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # other users read it in some cases
        # Everything is imported once: forked processes, other users' too, have it then.
        with contextlib.redirect_stdout(io.StringIO()):
            command(shop.export(root / "first"))
            command(shop.page(root / "first.html", shop.root / "rows.jsonl"))
        for number, (called, (area, mounts, tried)) in enumerate(CASES.items()):
            row = table.setdefault(area, {"tried": 0, "held": 0, "skipped": 0})
            if arguments.case and arguments.case not in called:
                continue
            if (mounts and not namespace) or (os.getuid() and area != "html"):
                row["skipped"] += 1
                continue
            (root / f"{number}").mkdir()
            held, said = tried(shop, root / f"{number}")
            row["tried"] += 1
            row["held"] += held
            if not held:
                faults.append(f"{area}, {called}: {said}")
                print(faults[-1], flush=True)
        for kind in ("beside", "a volume", "the working directory"):
            if arguments.case or (kind == "a volume" and not namespace):
                continue
            (root / kind).mkdir()
            counts = kills(shop, kind, root / kind)
            faults += [f"killed, {kind}, {one}" for one in counts["faults"]]
            held = counts["kills"] - len(counts.pop("faults"))
            table[f"killed, {kind}"] = {"tried": counts["kills"], "held": held, **counts}
            print(kind, table[f"killed, {kind}"], flush=True)
    took = round(time.perf_counter() - began, 1)
    print(json.dumps(table, indent=1))
    if not arguments.case:
        print(write_result(arguments, {"seconds": took, "table": table, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
