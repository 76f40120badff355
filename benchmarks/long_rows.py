"""Memory and time of rows at the limit, and of files that stand for more than they are.

Each case is a file that `show-data` reads in a process of its own with the limit of a row as it is,
16 MiB; its exit code, its largest resident set and its seconds are the result, those of the
processor too, which other work on the machine does not lengthen. The same command on a row of a few
words says what the process takes anyway. Needs the extra `data`. Takes about five minutes.

    python benchmarks/long_rows.py
    python benchmarks/long_rows.py --only chat
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import make_parser, write_result

SIZE = 15 * 2**20
SENTENCE = "once upon a time there was a little girl who liked to count things. "
WORDS = SENTENCE * (SIZE // len(SENTENCE))
LINES = (SENTENCE + "\n") * (SIZE // (len(SENTENCE) + 1))
SHORT = {"prompt": "a", "completion": "b"}


def lines(*rows: Any) -> Callable[[Path], Path]:
    """A maker of JSON lines."""

    def make(folder: Path) -> Path:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def chat(*contents: str) -> dict[str, Any]:
    """A chat of turns that take turns."""
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[n % 2], "content": content} for n, content in enumerate(contents)
        ]
    }


def parquet(values: list[str], **options: Any) -> Callable[[Path], Path]:
    """A maker of a Parquet file with a column of texts."""

    def make(folder: Path) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = folder / "rows.parquet"
        table = pyarrow.table({"text": values})
        pyarrow.parquet.write_table(table, path, compression="zstd", **options)
        return path

    return make


def packed(folder: Path) -> Path:
    """A line of 200 MB in 200 KB."""
    path = folder / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "' + b"a" * 200 * 10**6 + b'"}')
    return path


def array(folder: Path) -> Path:
    """A JSON array of many rows on one line."""
    path = folder / "rows.json"
    path.write_text(json.dumps([{"text": SENTENCE}] * (4 * SIZE // len(SENTENCE))))
    return path


CASES: dict[str, Callable[[Path], Path]] = {
    "a short row": lines(SHORT, SHORT),
    "a text of lines": lines({"text": LINES}),
    "a text without line ends": lines({"text": WORDS}),
    "a text without blanks": lines({"text": "x" * SIZE}),
    "a long completion": lines(SHORT, SHORT, {**SHORT, "completion": WORDS}),
    "a long prompt": lines(SHORT, SHORT, {**SHORT, "prompt": WORDS}),
    "a chat with a long question": lines(chat("a", "b"), chat("a", "b"), chat(WORDS, "b")),
    "a chat with a long answer": lines(chat("a", "b"), chat("a", "b"), chat("a", WORDS)),
    "a chat of 2,000 turns": lines(*[chat(*[SENTENCE] * 2000)] * 3),
    "a line above the limit": lines({"text": WORDS + WORDS}),
    "a JSON array of 60 MiB on a line": array,
    "gzip: a line of 200 MB": packed,
    "Parquet: a row of 50 MiB": parquet(["x" * 50 * 2**20]),
    "Parquet: 300 rows, one of 15 MiB": parquet([*["a b"] * 299, "x" * SIZE]),
    "Parquet: 60 rows that name one value of 15 MiB": parquet(
        ["x" * SIZE] * 60, dictionary_pagesize_limit=2**30
    ),
}


def measured(path: Path) -> dict[str, Any]:
    """What `show-data` takes for a file."""
    run = "from qlora_kit.commands.show_data import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "--model", "tiny", "--data", str(path)]
    command += ["--token_cache", "none", "--rows", "0", "--eval_fraction", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode().strip().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "peak_bytes": usage.ru_maxrss * 1024,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "said": said[-1] if said else "",
        "file_bytes": path.stat().st_size,
    }


def main() -> None:
    """Measure every case, print the table, and write it."""
    parser = make_parser(__doc__, "long_rows")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    # What a case would take without bounds must not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    results = {}
    for name, make in CASES.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own: what is started from here begins with what this one holds.
            if not (child := os.fork()):
                make(Path(folder))
                os._exit(0)
            os.waitpid(child, 0)
            results[name] = found = measured(next(Path(folder).iterdir()))
        peak = found["peak_bytes"] / 2**20
        print(f"{name:48} exit {found['exit']}  {peak:6.0f} MiB  {found['cpu_seconds']:6.1f} s")
    write_result(options, {"cases": results})


if __name__ == "__main__":
    main()
