"""Reading and encoding against `datasets.map`, training padded, grouped and packed, and memory.

Encoding is measured in processes of their own, alternating, and the best of the rounds is taken:
other work on the machine only ever makes a round slower. Training takes the orders step about in
one process, so that other work falls on all of them. Needs QLORA_KIT_DATA and
the extra `data`. `--memory` also writes a file of 10 million lines and 5 GB to a temporary folder
(and 10 GB of tokens beside it at most), and takes that file through reading, encoding and the
order of an epoch.

    python benchmarks/data.py
    python benchmarks/data.py --only memory --lines 10000000 --bytes 5000000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_jobs import encode_datasets, encode_ours, memory, padding, train
from record import make_parser, write_result

JOBS = {"ours": encode_ours, "datasets": encode_datasets, "memory": memory}


def in_process(job: str, argument: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--argument", argument]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The fastest of the rounds."""
    return min(rounds, key=lambda found: found["seconds"])


def compare_encoding(path: Path, rounds: int) -> dict[str, Any]:
    """Rows a second of both, alternating, and how much faster ours is."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "datasets": []}
    for _ in range(rounds):
        for job, measured in found.items():
            measured.append(in_process(job, str(path)))
            print(path.name, job, measured[-1], flush=True)
    result: dict[str, Any] = {job: best(measured) for job, measured in found.items()}
    assert result["ours"]["tokens"] == result["datasets"]["tokens"]
    for measured in result.values():
        measured["rows_per_s"] = measured["rows"] / measured["seconds"]
    result["ratio"] = result["ours"]["rows_per_s"] / result["datasets"]["rows_per_s"]
    return result


def compare_training() -> dict[str, Any]:
    """Real tokens a second in each order, and the ratios to random batches, by recompute level."""
    result: dict[str, Any] = {}
    for level in ("full", "none"):
        found: dict[str, Any] = in_process("train", level)
        for measured in found.values():
            measured["tokens_per_s"] = measured["tokens"] / measured["seconds"]
            measured["padding"] = 1 - measured["tokens"] / measured["slots"]
        for order in ("grouped", "packed"):
            ratio = found[order]["tokens_per_s"] / found["random"]["tokens_per_s"]
            found[f"{order}_over_random"] = ratio
        print(level, found, flush=True)
        result[level] = found
    return result


def write_rows(path: Path, source: Path, lines: int) -> None:
    """A file of that many rows: GSM8K's, each with a number that makes it another one."""
    rows = [json.loads(line) for line in source.open()]
    with path.open("w") as file:
        for number in range(lines):
            row = rows[number % len(rows)]
            # Short rows, as many data sets have them: what a row costs is what is measured.
            question = f"{number}: {row['question'][:80]}"
            file.write(json.dumps({"question": question, "answer": row["answer"][:80]}) + "\n")


def main() -> None:
    parser = make_parser(__doc__, "data")
    parser.add_argument("--only", choices=["encoding", "training", "memory"], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the generated file")
    parser.add_argument("--lines", type=int, default=10_000_000, help="of the memory file")
    parser.add_argument("--bytes", type=int, default=5_000_000_000, help="of the memory file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--argument", help=argparse.SUPPRESS)
    given = parser.parse_args()
    data = Path(os.environ["QLORA_KIT_DATA"])
    if given.job == "train":
        print(json.dumps(train(given.argument, data)))
        return
    if given.job:
        print(json.dumps(JOBS[given.job](Path(given.argument), data)))
        return
    gsm8k = data / "text/gsm8k/train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "encoding"):
            small, large = Path(folder) / "gsm8k.jsonl", Path(folder) / "generated.jsonl"
            small.write_bytes(gsm8k.read_bytes())
            write_rows(large, gsm8k, given.rows)
            result = {
                "gsm8k": compare_encoding(small, given.rounds),
                f"generated_{given.rows}": compare_encoding(large, max(1, given.rounds - 1)),
            }
            print(write_result(given, result, "encoding"))
            large.unlink()
        if given.only in (None, "training"):
            epoch = padding(data)
            result = {"padding_of_an_epoch": epoch, **compare_training()}
            print(write_result(given, result, "training"))
        if given.only in (None, "memory"):
            path = Path(folder) / "large.jsonl"
            line = json.dumps({"text": ""}) + "\n"
            words = (given.bytes // given.lines - len(line) - 10) // 10
            with path.open("w") as file:
                for number in range(given.lines):
                    text = f"{number:09d} " + "w" * 9 + " " + ("v" * 9 + " ") * (words - 1)
                    file.write(json.dumps({"text": text}) + "\n")
            size = path.stat().st_size
            result = {"lines": given.lines, "bytes": size, **in_process("memory", str(path))}
            print(result)
            print(write_result(given, result, "memory"))


if __name__ == "__main__":
    main()
