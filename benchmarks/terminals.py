"""Every command on every kind of terminal, locale and pipe: tried and held, with rows that are
hostile to a terminal.

What holds: the exit code of the contract, no traceback, `--json` that is JSON, no character that a
terminal obeys, and for what leaves files all of them. Each case is a process of its own. About 4
minutes on 2 cores.

    OMP_NUM_THREADS=1 python benchmarks/terminals.py
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass, field
from pathlib import Path

from record import make_parser, write_result

MAIN = "import sys; from qlora_kit.commands.main import main; sys.exit(main(sys.argv[1:]))"
HOSTILE = "\x1b]0;pwned\x07\x1b[2J\x9b2J\u202e\u2066na\u00efve \u4e2d\r\x08\u200f\u2028"
SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
"""What a command itself sends to a terminal: colours, and a bar that is drawn over."""
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028]")


@dataclass(frozen=True)
class Kind:
    """A kind of terminal: redirections of a shell, variables, or a terminal of 80 columns."""

    redirections: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    terminal: bool = False
    lost: bool = False
    """Whether stdout cannot be written to, and that is an error where it is the product."""
    seen: bool = True
    """Whether what is printed arrives."""


PLAIN = {"LC_ALL": "C.UTF-8"}
KINDS = {
    "a pipe, UTF-8": Kind(variables=PLAIN),
    "ASCII": Kind(variables={"PYTHONIOENCODING": "ascii:strict"}),
    "Latin-1": Kind(variables={"PYTHONIOENCODING": "latin-1:strict"}),
    "locale POSIX": Kind(
        variables={"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ),
    "stdout closed": Kind(">&-", seen=False),
    "stderr closed": Kind("2>&-"),
    "all three closed": Kind("<&- >&- 2>&-", seen=False),
    "stdout full": Kind(">/dev/full", lost=True, seen=False),
    "stderr full": Kind("2>/dev/full"),
    "the reader goes": Kind("| head -1; exit ${PIPESTATUS[0]}", seen=False),
    "a terminal": Kind(variables=PLAIN, terminal=True),
    "a pipe, colours asked for": Kind(variables={**PLAIN, "FORCE_COLOR": "1"}),
    "a terminal that is dumb": Kind(variables={**PLAIN, "TERM": "dumb"}, terminal=True),
}
PRODUCT = {"plan", "generate", "evaluate", "evaluate --json", "show-data", "show-data --json"}
"""Commands whose only product is what they print."""


def commands(directory: Path, output: Path) -> dict[str, list[str]]:
    """The arguments of each command; `output` is where one that leaves files writes."""
    data, adapter = str(directory / "rows.jsonl"), str(directory / "adapter")
    rows = ["--data", data, "--token_cache", "none", "--max_length", "128"]
    short = [*rows, "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    evaluate = ["evaluate", "--adapter", adapter, *rows, "--max_new_tokens", "2", "--generate", "2"]
    return {
        "finetune": ["finetune", *short, "--sample_prompts", "1", "--output_dir", str(output)],
        "plan": ["plan", "--max_length", "64"],
        "export": ["export", "--adapter", adapter, "--output_dir", str(output)],
        "generate": [
            "generate",
            "--adapter",
            adapter,
            "--prompt",
            HOSTILE,
            "--max_new_tokens",
            "4",
        ],
        "evaluate": evaluate,
        "evaluate --json": [*evaluate, "--json"],
        "show-data": ["show-data", *rows],
        "show-data --json": ["show-data", *rows, "--json"],
    }


def start(arguments: list[str], kind: Kind, directory: Path) -> tuple[int, str]:
    """Run a command on a kind of terminal; its exit code, and what arrived of both streams."""
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", **kind.variables}
    if kind.terminal:
        environment.pop("COLUMNS")
        return on_terminal([sys.executable, "-c", MAIN, *arguments], environment, directory)
    done = subprocess.run(
        ["bash", "-c", f'"$@" {kind.redirections}', "bash", sys.executable, "-c", MAIN, *arguments],
        capture_output=True,
        env=environment,
        cwd=directory,
        check=False,
    )
    encoding = "latin-1" if "latin-1" in str(kind.variables) else "utf-8"
    return done.returncode, (done.stdout + done.stderr).decode(encoding)


def on_terminal(command: list[str], environment: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run a command on a pseudo-terminal of 80 columns; its exit code and what arrived."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd
    )
    os.close(theirs)
    arrived = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        arrived += block
    os.close(ours)
    return process.wait(), arrived.decode("utf-8")


def fault_of(name: str, kind: Kind, directory: Path, output: Path) -> str | None:
    """What did not hold of one command on one kind of terminal, if anything."""
    code, text = start(commands(directory, output)[name], kind, directory)
    wanted = 4 if kind.lost and name in PRODUCT else 0
    if code != wanted:
        return f"exit {code} instead of {wanted}: {text[-300:]!r}"
    if "Traceback" in text or "unexpected" in text:
        return f"a traceback: {text[-300:]!r}"
    if wanted and "stdout" not in text:
        return f"stdout is not named: {text!r}"
    if kind.seen and not text:
        return "nothing arrived"
    colours = kind.terminal or "FORCE_COLOR" in kind.variables
    shown = SEQUENCES.sub("", text) if colours else text
    # An answer goes into a pipe as it is.
    found = OBEYED.search(shown) if name != "generate" or kind.terminal else None
    if found:
        return f"{found[0]!r} arrived in {shown[max(0, found.start() - 80) : found.end()]!r}"
    if name.endswith("--json") and kind.seen:
        try:
            json.loads(text)
        except ValueError as error:
            return f"no JSON: {error}: {text[:200]!r}"
    marks = {"finetune": "run.json", "export": "export.json"}
    if name in marks and not (output / marks[name]).exists():
        return f"{marks[name]} is not there"
    return None


def prepare(directory: Path) -> None:
    """Rows that are hostile, and an adapter."""
    row = json.dumps({"prompt": f"{HOSTILE} a", "completion": f" {HOSTILE}"})
    (directory / "rows.jsonl").write_text(f"{row}\n" * 30)
    arguments = commands(directory, directory / "adapter")["finetune"]
    code, text = start(arguments, KINDS["a pipe, UTF-8"], directory)
    assert code == 0, text


def main() -> None:
    parser = make_parser(__doc__, "terminals")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--commands", nargs="*", help="all by default")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        names = arguments.commands or list(commands(directory, directory))
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            cases = {
                (kind, command): pool.submit(
                    fault_of, command, KINDS[kind], directory, directory / f"out-{number}"
                )
                for number, (kind, command) in enumerate(
                    (kind, command) for kind in arguments.kinds for command in names
                )
            }
            for (kind, command), case in cases.items():
                fault = case.result()
                table.setdefault(kind, {})[command] = fault or "held"
                print(f"{kind} / {command}: {fault or 'held'}", flush=True)
    tried = sum(len(row) for row in table.values())
    held = sum(fault == "held" for row in table.values() for fault in row.values())
    print(f"{tried} tried, {held} held")
    print(write_result(arguments, {"tried": tried, "held": held, "table": table}))


if __name__ == "__main__":
    main()
