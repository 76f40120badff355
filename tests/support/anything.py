"""Values of every type at every place that takes one, and the judge of what comes of them.

A target makes a case out of a folder that it may change: the arguments of a command, with a value
put at one place. Each case is run as `qlora-kit` in a process forked for it. Whatever the value
is, the exit code is one of the contract's, the last line on stderr is an error's where it is not
0, and what is refused takes less than two seconds of processor time; the rest is a finding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import yaml
from option_groups import OPTION_GROUPS

from qlora_kit.commands.main import COMMANDS, main
from qlora_kit.errors import ERROR_LINE_LIMIT
from qlora_kit.options.option import flag_of

CODES = (0, 2, 3, 4, 5, 143)
"""Of the contract; 143 is that of a run that trains until it is asked to stop."""
REFUSED_S, CASE_S, LONGEST_S = 2.0, 10.0, 120.0
"""Processor time of a refusal; processor time, or time, after which a case is asked to stop."""
MEMORY = 4 * 1024**3


@dataclass(frozen=True)
class Case:
    """One run: `place` is what was given `value`, as a reader of the result would name it."""

    command: str
    arguments: Sequence[str]
    place: str
    value: str


class Target(Protocol):
    """Places of one kind."""

    name: str

    def make(self, draw: random.Random, work: Path) -> Case:
        """A case, its files written in the fresh folder `work`, in which the command is run."""


@dataclass(frozen=True)
class Answer:
    """What a case gave; `finding` says what of the contract it broke."""

    code: int
    line: str
    processor_s: float
    finding: str | None


# Values -----------------------------------------------------------------------------------------

TEXTS = (
    *("", " ", "\t", "\n", "a", "None", "null", "nan", "auto", "all", "none", "true", "False"),
    *("off", "yes", "-", "--", "-1", "+1", "tiny", "sample", ".", "..", "./", "~", "~nosuch/x"),
    *(
        "~/x",
        "~root",
        "a\0b",
        "x\udcff",
        "\ud800",
        "\u202etxt",
        "٣",
        "cuda:٣",
        "\U0001d7db",
        "½",
        "²",
    ),
    *("x" * 5000, "a/" * 300, "y" * 250 + "/" + "z" * 200, "one\ntwo", "\x1b[2J", "\r", "\ufeffa"),
    *("%s %d %(x)s", "{0} {x}", "{{ 7*7 }}", "a,b,,", ",", "=", "a=b", "a=b=c", "$HOME", "*", "["),
    *("(", "(a+)+$", "\\", "../../x", "loop", "gone", "pipe", "rows.jsonl", "base", "door"),
    *("adapter", "/dev/null", "/dev/zero", "/dev/full/x", "/proc/self/mem", "rows.jsonl/x", "a//b"),
    *("0x10", "0b1", "0o7", "042", "1_000", "1e3", "1.", ".5", "1:30", "1,000", "infinity", "-inf"),
    *("8GiB", "8 gb", "8", "1e3GiB", "999999999999999TiB", "2024-01-01", "2024-13-45", "https://x"),
    *(
        "https://user:pass@host/x",
        "owner/name:subset",
        "sample:",
        "sample:x",
        "__class__",
        "👩‍👩‍👧",
    ),
    *("cosine", "nf4", "bf16", "hf", "full", "messages", "chatml", "tensorboard", "wandb"),
    *("all-linear", "q_proj", "q_proj,v_proj", ".*", "cpu", "cuda", "cuda:99999", "auto "),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 16, 65536, 65537, 10**6, 10**9, 2**31, 2**32, 2**63 - 1, 2**63, 2**64),
    *(10**20, 10**100, 10**400, -(10**20), 0.0, -0.0, 0.5, 0.999999999999, 1.0, 1.0000001, 1e5),
    *(1e-7, 1e-320, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf),
)
RAW = (
    *("042", "0o17", "0x1F", "1_000", "190:20:30", "1e-4", "1.10", ".inf", ".NaN", "-.inf", "~"),
    *("2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "=", "<<", "off", "y", "NO"),
    *("!!int ''", "!!float ''", "!!float abc", "!!int abc", "!!bool abc", "!!timestamp abc"),
    *("!!null abc", "!!str 5", "!!str", "!!seq abc", "!!map abc", "!!merge a", "!!binary QQ=="),
    *(
        "!!set {a}",
        "!!omap [a: 1]",
        "!!python/name:os.mkdir",
        "!own 1",
        "&a [*a]",
        "*gone",
        "|\n a",
    ),
    *(">\n  folded\n  text", "'it''s'", '"\\0"', '"\\ud800"', '"\\e[2J"', '"\\x9b"', "[a, [b]]"),
    *("{a: 1}", "? a", "- a", "[,]", "{", "@a", "%a", "`a`", "'", "\ta", "a: b", "a #b", "!!"),
)


def text(draw: random.Random) -> str:
    """A text: one with a history, or any characters at all."""
    if draw.random() < 0.7:
        return draw.choice(TEXTS)
    ranges = ((32, 127), (0, 32), (127, 160), (160, 0x3000), (0xD800, 0xE000), (0, 0x110000))
    low, high = draw.choice(ranges)
    drawn = "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 12)))
    return drawn.lstrip("/")  # a place outside the folder is named by choice only


def number(draw: random.Random) -> int | float:
    """A number of any size and sign."""
    if draw.random() < 0.5:
        return draw.choice(NUMBERS)
    size = draw.choice((-1, 1)) * 10 ** draw.uniform(-12, 25)
    return round(size) if draw.random() < 0.5 else size


def value(draw: random.Random, depth: int = 0) -> Any:
    """A value of any type that a configuration can hold."""
    kind = draw.choice(("text", "number", "number", "bool", "none", "list", "dict", "date"))
    if kind == "text" or (depth > 2 and kind in ("list", "dict")):
        return text(draw)
    if kind == "number":
        return number(draw)
    if kind == "bool":
        return draw.random() < 0.5
    if kind == "none":
        return None
    if kind == "list":
        return [value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2, 5)))]
    if kind == "dict":
        return {text(draw): value(draw, depth + 1) for _ in range(draw.choice((0, 1, 3)))}
    day = datetime.date.fromordinal(draw.randrange(1, 3_000_000))
    return day if draw.random() < 0.5 else datetime.datetime(day.year, day.month, day.day, 1, 2)


# The folder, and the options --------------------------------------------------------------------


def make_shop(shop: Path) -> None:
    """What cases are made in: a base, one whose tokenizer is broken, an adapter, rows, odd files.

    A command on `door` ends once its options and the first files were looked at, weights unread.
    """
    import torch
    from families import save_checkpoint
    from trained import save_trained, write_rows

    save_checkpoint(shop / "base", "llama_bias", torch.bfloat16)
    shutil.copytree(shop / "base", shop / "door")
    (shop / "door" / "tokenizer.json").write_text("{}")
    save_trained(shop / "base", shop / "adapter", bits=4, dtype="fp32")
    write_rows(shop / "rows.jsonl")
    (shop / "loop").symlink_to("loop")
    (shop / "gone").symlink_to("nowhere")


SHORT = "--max_steps 2 --gradient_accumulation_steps 1 --max_length 64 --token_cache none"
GOOD = {
    "finetune": f"--data rows.jsonl --output_dir out --eval_fraction 0.2 {SHORT}",
    "plan": "--max_length 64 --device_memory 8GiB",
    "export": "--adapter adapter --output_dir merged --verify rows.jsonl",
    "generate": "--adapter adapter --prompt a --max_new_tokens 2",
    "chat": "--adapter adapter --max_new_tokens 2",
    "evaluate": "--adapter adapter --data rows.jsonl --max_new_tokens 2",
    "show_data": "--data rows.jsonl --token_cache none",
    # An address for documentation (RFC 5737), which no machine has: it ends where it would listen.
    "serve": "--adapter adapter --host 192.0.2.1",
    "runs": "--runs_dir .",
    "cache": "--json",
    "quantize": "--output_dir quantized --verify rows.jsonl",
}
"""Of each command what makes it short."""
WITHOUT_BASE = frozenset({"runs", "cache"})
"""Commands that take no base."""
EDGES = r"(?:at least|above) (\S+) and (?:at most|below) (\S+)"


@functools.cache
def flags_of(command: str) -> tuple[str, ...]:
    """The flags of a command, as its `--help` lists them."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help"])
    flags = re.findall(r"^  (--\w+)", shown.getvalue(), re.MULTILINE)
    return tuple(flag for flag in flags if flag not in ("--help", "--debug"))


@functools.cache
def edges_of(flag: str) -> tuple[str, ...]:
    """The smallest and the largest number that an option takes, where it takes numbers."""
    for group in OPTION_GROUPS:
        for field in dataclasses.fields(group):  # type: ignore[arg-type]
            check = field.metadata["option"]["check"]
            if f"--{flag_of(field)}" == flag and callable(check):
                with contextlib.suppress(TypeError, AttributeError):  # a check of texts
                    said = re.fullmatch(EDGES, str(check(math.nan)))
                    return () if said is None else (said[1], said[2])
    return ()


@dataclass
class Options:
    """Every option of every command, by a flag or by a line of a config file.

    `whole` is the share of the cases that are run on the good base, to their end.
    """

    whole: float = 0.0
    name: str = "options"

    def make(self, draw: random.Random, work: Path) -> Case:
        """As the protocol says."""
        command = draw.choice(sorted(COMMANDS.keys() & GOOD.keys()))
        flag = draw.choice(flags_of(command))
        good = GOOD[command].split()
        if command not in WITHOUT_BASE:
            good = ["--model", "./base" if draw.random() < self.whole else "./door", *good]
        if edges_of(flag) and draw.random() < 0.15:
            edge = draw.choice(edges_of(flag))
            good[1] = "./base"
            return Case(command, [*good, flag, edge], f"{command} {flag}", edge)
        if draw.random() < 0.5 or flag == "--config":
            given = (
                value(draw) if draw.random() < 0.3 else (text, number)[draw.random() < 0.5](draw)
            )
            shown = str(given).encode("utf-8", "surrogateescape" if ok(str(given)) else "replace")
            argument = shown.decode("utf-8", "surrogateescape").replace(
                "\0", ""
            )  # as argv holds it
            joined = [f"{flag}={argument}"] if draw.random() < 0.5 else [flag, argument]
            return Case(command, [*good, *joined], f"{command} {flag}", repr(argument)[:80])
        name = flag[2:]
        if flag in good:  # a flag would beat the file
            del good[good.index(flag) : good.index(flag) + 2]
        if draw.random() < 0.5:
            written = draw.choice(RAW)
        else:
            written = yaml.safe_dump(value(draw), default_flow_style=True, width=10**6)
            written = written.removesuffix("\n...\n")
        content = f"{name}: {written}\n".encode("utf-8", "surrogatepass")
        (work / "any.yaml").write_bytes(content)
        case = f"{command} {name}:"
        return Case(command, [*good, "--config", "any.yaml"], case, repr(written)[:80])


def ok(given: str) -> bool:
    """Whether a text can be an argument of the system: surrogates stand for bytes alone."""
    try:
        given.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


# The judge --------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Makes and runs cases in copies of `shop`, one at a time, in the folder `work`."""

    shop: Path
    work: Path
    seed: int

    def case(self, target: Target, number: int) -> Case:
        """The case of that number, its files written."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.shop, self.work, symlinks=True)
        os.mkfifo(self.work / "pipe")
        return target.make(random.Random(f"{self.seed} {target.name} {number}"), self.work)

    def run(self, case: Case) -> Answer:
        """Run it in a process of its own."""
        said = self.work.with_name("said.txt")
        pid = os.fork()
        if not pid:
            self._child(case, said)
        began, asked = time.perf_counter(), False
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            late = time.perf_counter() - began
            if not asked and (late > LONGEST_S or _spent(pid) > CASE_S):
                os.kill(pid, signal.SIGTERM)
                asked = True
            elif late > 2 * LONGEST_S:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(status)
        spent = usage.ru_utime + usage.ru_stime
        lines = said.read_text(errors="replace").splitlines() or [""]
        return Answer(code, lines[-1], spent, self._finding(case, code, lines[-1], spent))

    def _finding(self, case: Case, code: int, line: str, spent: float) -> str | None:
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        if code == 143 and not list(self.work.glob("*/metrics.jsonl")):
            return f"no answer in {spent:.0f} s, and nothing is trained"
        if code not in CODES:
            return f"exit code {code}: {line}"
        if code and not line.startswith("error: "):
            return f"exit code {code} without its line: {line}"
        if len(line) > ERROR_LINE_LIMIT and code:
            return f"an error line of {len(line)} characters"
        if code in (2, 3) and spent > REFUSED_S:
            return f"refused after {spent:.1f} s: {line}"
        return None

    def _child(self, case: Case, said: Path) -> NoReturn:
        code = 99
        try:
            os.chdir(self.work)
            os.environ["HOME"] = str(self.work)
            os.environ["QLORA_KIT_CACHE"] = str(self.work / "kept")  # which a case may clear
            null, log = (
                os.open(os.devnull, os.O_RDWR),
                os.open(said, os.O_WRONLY | os.O_CREAT, 0o666),
            )
            os.ftruncate(log, 0)
            for handle, to in ((0, null), (1, null), (2, log)):
                os.dup2(to, handle)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            sys.stdout, sys.stderr = (
                open(handle, "w", encoding="utf-8", errors=errors, buffering=1, closefd=False)  # noqa: SIM115
                for handle, errors in ((1, "strict"), (2, "backslashreplace"))
            )
            code = main([case.command, *case.arguments])
            sys.stdout.flush()
            sys.stderr.flush()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 98
        except BaseException as error:
            os.write(2, f"\n{type(error).__name__} out of the command\n".encode())
        finally:
            os._exit(code)


def _spent(pid: int) -> float:
    """Seconds that a process and its threads have had a processor for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def prepare_process() -> None:
    """Import what the commands import, so that a fork has it: its time is not a refusal's."""
    import torch

    torch.set_num_threads(1)  # a fork has no threads but its own
