"""Runs of the real command in processes of their own that are killed or failed at a chosen call.

A server process imports everything and makes a run once, on one thread, and forks for each run, so
that a run of a tiny model takes a fraction of a second. In the child the functions of `os` that
change the disk are counted; at the chosen one the process is killed (before it, after it, or in the
middle of a write), or the call fails as a full disk does.

Run as a script, this file is that server: one JSON object a line in, one out.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import qlora_kit
from qlora_kit.process.signals import SIGNALS

WRITES = ("write", "pwrite")
CALLS = ("open", *WRITES, "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")
"""Functions of `os` through which all of a run's files come and go."""
STEPS = 5
SETTINGS = (
    "--bits 16 --dtype fp32 --batch_size 2 --gradient_accumulation_steps 1 --lora_r 4 "
    f"--lora_dropout 0.1 --learning_rate 1e-2 --max_steps {STEPS} --save_steps 1 --eval_steps 2 "
    "--max_length 32 --gradient_checkpointing none"
).split()


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call (from 1): kill `before`, `after` or `inside`, or `fail`.

    With `path`, only calls with a path that has this text are counted.
    """

    at: int
    how: str = "before"
    path: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (negative: a signal), its output, and its calls by name.

    The calls are known of a run that came to its end.
    """

    code: int
    output: str
    calls: tuple[str, ...]

    @property
    def error(self) -> str:
        """The last line of the output."""
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


class Server:
    """The process that forks the runs."""

    def __init__(self) -> None:
        tests, package = Path(__file__).parent.parent, Path(qlora_kit.__file__).parent
        paths = [str(path) for path in (package.parent, tests, tests / "support")]
        paths.append(os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request; its reply."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class Job:
    """A training run that is repeated with faults; `directory` is where its files are."""

    directory: Path
    server: Server
    arguments: tuple[str, ...] = ()

    def having(self, *arguments: str) -> Job:
        """The same job with more arguments."""
        return replace(self, arguments=(*self.arguments, *arguments))

    def prepare(self) -> Job:
        """Make the base model and the data."""
        from families import save_checkpoint

        self.directory.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.directory / "base")
        draw = random.Random(5)
        for name, count in (("train", 7), ("valid", 3)):
            rows = [
                {
                    "prompt": " ".join(
                        f"w{draw.randint(3, 50)}" for _ in range(draw.randint(2, 6))
                    ),
                    "completion": " ".join(f"w{draw.randint(3, 50)}" for _ in range(4)),
                }
                for _ in range(count)
            ]
            path = self.directory / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self

    def command(self, output: Path, *extra: str) -> list[str]:
        """The arguments of a run into `output`."""
        return [*self.inputs, *SETTINGS, *self.arguments, "--output_dir", str(output), *extra]

    @property
    def inputs(self) -> list[str]:
        """The arguments that name the model and the data."""
        return ["--model", str(self.directory / "base"), "--data", str(self.directory / "data")]

    def start(self, output: Path, *extra: str, **options: Any) -> Running:
        """Fork a process that runs the command into `output`; the options are `start_command`'s."""
        return self.start_command(self.command(output, *extra), **options)

    def start_command(
        self,
        command: list[str],
        *,
        fault: Fault | None = None,
        inject: str | None = None,
        limits: dict[str, int] | None = None,
        cwd: Path | None = None,
        script: str | None = None,
    ) -> Running:
        """Fork a process that runs a command in the folder `cwd`, or instead of it Python lines.

        `inject` names a function of `injections.py` that it calls first, with the words that
        follow the name; `limits` are names of
        `resource` with the soft limit that is set.
        """
        log = self.directory / f"log-{time.monotonic_ns()}"
        request = {
            "command": command,
            "log": str(log),
            "fault": None if fault is None else asdict(fault),
            "inject": inject,
            "limits": limits or {},
            "cwd": str(cwd or self.directory),
            "script": script,
        }
        return Running(self.server, self.server.ask(request)["pid"], log)

    def run_command(self, command: list[str], **options: Any) -> Outcome:
        """Run a command to its end; the options are those of `start_command`."""
        return self.start_command(command, **options).wait()

    def run(self, output: Path, *extra: str, **options: Any) -> Outcome:
        """Run the command to its end, or to the fault; the options are `start_command`'s."""
        return self.start(output, *extra, **options).wait()


@dataclass
class Running:
    """A forked run."""

    server: Server
    pid: int
    log: Path

    def wait(self) -> Outcome:
        """How it ended."""
        status = self.server.ask({"wait": self.pid})["status"]
        output = self.log.read_text() if self.log.exists() else ""
        calls = self.log.with_suffix(".calls")
        made = tuple(calls.read_text().split()) if calls.exists() else ()
        for path in (self.log, calls):
            path.unlink(missing_ok=True)
        return Outcome(os.waitstatus_to_exitcode(status), output, made)

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Wait until the output has `text`."""
        until = time.monotonic() + timeout_s
        while not (self.log.exists() and text in self.log.read_text()):
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


class Counter:
    """Counts the calls of this process that change the disk, and strikes at one of them."""

    def __init__(self, fault: Fault | None, report: Path) -> None:
        self.fault, self.report, self.calls = fault, report, list[str]()
        self._real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self._counted(name))

    def save(self) -> None:
        """Tell the parent which calls there were."""
        handle = self._real["open"](self.report, os.O_WRONLY | os.O_CREAT)
        self._real["write"](handle, " ".join(self.calls).encode())

    def _counted(self, name: str) -> Any:
        real = self._real[name]

        def call(*args: Any, **options: Any) -> Any:
            if self._is_free(name, args):
                return real(*args, **options)
            self.calls.append(name)
            fault = self.fault
            if fault is None or len(self.calls) != fault.at:
                return real(*args, **options)
            if fault.how == "fail":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            if fault.how == "inside" and name in WRITES:
                real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
            elif fault.how == "after":
                with contextlib.suppress(OSError):
                    real(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("killed")

        return call

    def _is_free(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a call changes nothing on the disk, or is not asked for."""
        if self.fault is not None and self.fault.path not in str(args[0]):
            return True
        if name == "open" and str(args[0]).startswith("/dev/"):
            return True
        if name in (*WRITES, "fsync", "ftruncate"):
            return args[0] <= 2
        return name == "open" and not args[1] & os.O_CREAT


def result_of(output: Path) -> dict[str, bytes]:
    """The files of a finished run that must not depend on how it came about."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    return {name: (output / name).read_bytes() for name in names}


def leftovers(output: Path) -> list[str]:
    """Hidden files of a run's directory: there are none once it is finished."""
    return sorted(path.name for path in output.iterdir() if path.name.startswith("."))


def damages(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way of damaging a file: name, and what does it."""
    content, draw = path.read_bytes(), random.Random(path.name)

    def flip() -> None:
        at = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)

    yield "deleted", path.unlink
    yield "emptied", lambda: path.write_bytes(b"")
    yield "cut", lambda: path.write_bytes(content[:-1])
    yield "longer", lambda: path.write_bytes(content + b"\0")
    for number in range(20):
        yield f"flipped {number}", flip


def serve() -> None:
    """Fork a run for each request, and say how it ended when asked."""
    from plans_kept import kept_plans

    with tempfile.TemporaryDirectory() as plans, kept_plans(Path(plans)):
        if torch.backends.cuda.is_built():
            # A plan's backward starts autograd's threads for a card there, which no fork has.
            _import_what_a_run_does()
        else:
            _warm_up()
        gc.collect()
        gc.freeze()  # forks share what is there, and none of them looks for garbage in it
        for line in sys.stdin:
            request = json.loads(line)
            if "wait" in request:
                reply = {"status": os.waitpid(request["wait"], 0)[1]}
            else:
                pid = os.fork()
                if not pid:
                    _child(request)
                reply = {"pid": pid}
            print(json.dumps(reply), flush=True)


def _warm_up() -> None:
    """What a process does at its first run only, such as torch's tables of operations."""
    from qlora_kit.commands.finetune import main

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        job = Job(Path(folder), None).prepare()  # type: ignore[arg-type]
        with contextlib.redirect_stderr(io.StringIO()):
            assert main(job.command(Path(folder) / "run")) == 0


def _import_what_a_run_does() -> None:
    """Import the modules that a run has, which is made in a process of its own."""
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        _warm_up()
        os.write(writes, "\n".join(sys.modules).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as names:
        for name in names.read().split():
            if name not in sys.modules:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
    assert os.waitpid(pid, 0)[1] == 0


def _child(request: dict[str, Any]) -> None:
    code = 99
    try:
        handle = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        for number in SIGNALS:  # a shell starts what it puts into the background without some
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        for name, limit in request["limits"].items():
            number = getattr(resource, name)
            resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
        if request["inject"]:
            from faults import injections

            name, _, argument = request["inject"].partition(" ")
            getattr(injections, name)(*argument.split())
        fault = request["fault"] and Fault(**request["fault"])
        counter = Counter(fault, Path(request["log"]).with_suffix(".calls"))
        from qlora_kit.commands.finetune import main

        if request["script"]:
            exec(request["script"], {"__name__": "__main__"})
            code = 0
        else:
            code = main(request["command"])
        sys.stdout.flush()
        sys.stderr.flush()
        counter.save()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
