"""Memory and time of what could take all of both: long rows, bombs, templates, huge plans.

Each case is a command in a process of its own, with a limit on its address space and on its time.
What it took at its peak, how long, and its exit code are compared with what they may be: no case
ends by a signal, by its limit of time, or with a fault of the program's own (exit code 1).

    python benchmarks/bounds.py                 # three minutes on two quiet cores
    python benchmarks/bounds.py --only plan

`--data` is the folder with configs/llama2_7b.json. Writes results/bounds.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import make_parser, write_result

MIB, GIB = 2**20, 2**30
SPACE = 8 * GIB
"""Address space of a case; torch alone reserves half of it."""
LOOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATES = {
    "powers of powers": "{% set x = 9**1000 %}{% set y = x**1000 %}{% set z = y**1000 %}",
    "a wide rounding": "{% set x = 1.5|round(300000000, 'ceil') %}",
    "a wide field of format": "{% set x = '{:>{w}}'.format('a', w=3000000000) %}",
    "a wide field of percent": "{% set x = '%*d' % (3000000000, 1) %}",
    "a wide indent": "{% set x = [1]|tojson(indent=3000000000) %}",
    "translate": "{% set x = ('a' * 900000).translate({97: 'b' * 100000}) %}",
    "bytes": "{% set x = 'a'.encode() * 3000000000 %}",
    "a tree that shares": (
        "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
        "{% set ns.x = dict(ns.x, **{'k'~i: ns.x}) %}{% endfor %}{{ ns.x|tojson }}"
    ),
}
"""Chat templates that ask for far more than a conversation needs."""


@dataclass(frozen=True)
class Case:
    """A command in a folder that `prepare` fills, the exit codes it may have, and its bounds."""

    name: str
    arguments: list[str]
    prepare: Callable[[Path], None]
    codes: tuple[int, ...]
    limit_bytes: int
    limit_s: float


def main() -> None:
    """Run every case, print a line each, write the table."""
    parser = make_parser(__doc__, "bounds")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QLORA_KIT_DATA", ".")))
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--slow", type=float, default=1.0, help="times the time that is allowed")
    given = parser.parse_args()
    found = []
    for case in cases(given.data.resolve()):
        if given.only in case.name:
            found.append(run(case, given.slow))
            print(line(found[-1]), flush=True)
    print(f"{sum(one['held'] for one in found)} of {len(found)} held")
    print(write_result(given, {"cases": found}))


def run(case: Case, slow: float) -> dict[str, Any]:
    """One case, and whether it held."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        case.prepare(folder)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_kit", *case.arguments],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("w"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE)),
        )
        code, peak = _wait(process, began + slow * case.limit_s)
        seconds = time.monotonic() - began
        said = (folder / "stderr").read_text(errors="replace").splitlines() or [""]
    held = code in case.codes and peak <= case.limit_bytes and seconds <= slow * case.limit_s
    return {
        "case": case.name,
        "exit_code": code,
        "expected": list(case.codes),
        "peak_bytes": peak,
        "limit_bytes": case.limit_bytes,
        "seconds": round(seconds, 1),
        "limit_s": slow * case.limit_s,
        "said": said[-1].replace(str(folder), "")[:200] if code else "",
        "held": held,
    }


def _wait(process: subprocess.Popen[bytes], until: float) -> tuple[int, int]:
    """The exit code and the peak of resident memory, of its own children too; killed when late."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss * 1024
        if time.monotonic() > until:
            process.kill()
        time.sleep(0.05)


def line(found: dict[str, Any]) -> str:
    """A case in a line."""
    word = "held" if found["held"] else "NOT HELD"
    return (
        f"{found['case']:38} {found['peak_bytes'] / MIB:7.0f} MiB {found['seconds']:6.1f} s "
        f"exit {found['exit_code']}  {word}"
    )


def cases(data: Path) -> Iterator[Case]:
    """All of them."""
    show = ["show-data", "--model", "tiny", "--token_cache", "none", "--rows", "0", "--data"]
    for size in (15, 17, 50):
        # Beyond the limit of a row it is refused; below, the row is one that no context holds.
        yield Case(
            f"rows: one of {size} MiB",
            [*show, "r.jsonl"],
            lambda folder, size=size: _one_row(folder / "r.jsonl", size * MIB),  # type: ignore[misc]
            (3,),
            GIB,
            30,
        )
    yield Case("rows: Parquet of 2 KB, 50 MiB", [*show, "b.parquet"], _bomb, (3,), GIB, 30)
    for name, text in TEMPLATES.items():
        yield Case(
            f"template: {name}",
            [*show, "c.jsonl", "--chat_template", "t.jinja"],
            lambda folder, text=text: _chats(folder, text + LOOP),  # type: ignore[misc]
            (0, 3),
            GIB,
            30,
        )
    for name in ("chat_template.jinja", "additional_chat_templates/x.jinja", "tokenizer.json"):
        yield Case(
            f"file: {name} of 3 GB",
            [*show, "c.jsonl", "--model", "m"],
            lambda folder, name=name: _model(folder, name),  # type: ignore[misc]
            (3,),
            GIB,
            15,
        )
    yield Case(
        "file: a normalizer that multiplies",
        [*show, "c.jsonl", "--model", "m"],
        lambda folder: _model(folder, None),
        (3,),
        GIB,
        15,
    )
    plan = ["plan", "--model", str(data / "configs" / "llama2_7b.json"), "--device_memory", "99GB"]
    for name, flags in {
        "batch 4096": "--batch_size 4096 --gradient_accumulation_steps 1 --max_length 128",
        "accumulation 16384": "--gradient_accumulation_steps 16384 --max_length 128",
        "batch and accumulation 65536": "--batch_size 65536 --gradient_accumulation_steps 65536",
        "batch 65536 of packs": "--batch_size 65536 --packing --bits 8 --device cpu",
        "batch 1000000": "--batch_size 1000000",
    }.items():
        yield Case(
            f"plan: {name}", [*plan, *flags.split()], lambda folder: None, (0, 2), 2 * GIB, 60
        )
    train = ["finetune", "--model", "tiny", "--data", "c.jsonl", "--token_cache", "none"]
    train += ["--output_dir", "o", "--max_steps", "1"]
    for name, flags in {
        "batch and accumulation 65536": "--batch_size 65536 --gradient_accumulation_steps 65536",
        "packs, a million epochs": "--num_train_epochs 1000000 --packing",
    }.items():
        yield Case(
            f"finetune: {name}",
            [*train, *flags.split()],
            lambda folder: _chats(folder, LOOP),
            (0,),
            2 * GIB,
            60,
        )


def _one_row(path: Path, size: int) -> None:
    text = "once upon a time " * (size // 17)
    path.write_text(json.dumps({"prompt": "a", "completion": text}) + "\n")


def _bomb(folder: Path) -> None:
    """Written by a process of its own: what pyarrow takes is not this one's."""
    code = (
        "import pyarrow as pa, pyarrow.parquet as pq\n"
        "rows = {'prompt': ['a'], 'completion': ['x' * (50 * 2**20)]}\n"
        "pq.write_table(pa.table(rows), 'b.parquet', compression='zstd')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def _chats(folder: Path, template: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "c.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    (folder / "t.jinja").write_text(template)


def _model(folder: Path, huge: str | None) -> None:
    """A copy of `tiny` with one file of 3 GB, of holes, or with a hostile normalizer."""
    import shutil

    import qlora_kit

    _chats(folder, LOOP)
    model = folder / "m"
    shutil.copytree(Path(qlora_kit.__file__).parent / "assets" / "tiny", model)
    if huge is not None:
        (model / huge).parent.mkdir(exist_ok=True)
        with (model / huge).open("ab") as file:
            file.truncate(3_000_000_000)
        return
    path = model / "tokenizer.json"
    replaced = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    found = json.loads(path.read_text())
    found["normalizer"] = {"type": "Sequence", "normalizers": [replaced] * 10}
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
