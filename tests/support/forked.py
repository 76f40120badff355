"""Commands, and programs without this package, in forks of a process that has imported things.

So an import is paid once, and what a command takes beyond it is measured: seconds of the processor,
which other work on the machine is not in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import gc, json, os, sys
before, after, call = sys.argv[1:]
exec(before)
gc.collect()
gc.freeze()
for line in sys.stdin:
    folder, said, arguments, variables = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.update(variables)
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(said + name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), handle)
        exec(call)
        exec(after)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    answer = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    print(json.dumps(answer), flush=True)
"""
COMMAND = """
from qlora_kit.commands.main import main
code = main(arguments)
"""
WITHOUT_US = """
sys.modules["qlora_kit"] = None
import bitsandbytes, peft, safetensors.torch, torch, transformers.integrations.bitsandbytes
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM
"""
PROGRAM = """
program, *sys.argv[1:] = arguments
exec(program, {"__name__": "__main__"})
code = 0
"""


@dataclass(frozen=True)
class Answer:
    """What a command gave, and the seconds of the processor that it took."""

    code: int
    seconds: float
    out: str
    err: str


class Forks:
    """A process that runs `before`, then forks for each command; `after` is run behind it.

    A fork neither looks for garbage in what it has not made nor takes that down when it ends.
    Its environment is this process's, or the one that is given. `call` is what a fork does with its
    `arguments`: it sets `code`.
    """

    def __init__(
        self,
        folder: Path,
        before: str = "",
        after: str = "",
        environment: Mapping[str, str] | None = None,
        call: str = COMMAND,
    ) -> None:
        self._said = folder / "said."
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, before, after, call],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**(environment or os.environ), "PYTHONPATH": str(ROOT)},
        )

    @classmethod
    def without_us(cls, folder: Path) -> Forks:
        """Forks that run Python programs, which cannot import this package, with arguments.

        What transformers, PEFT and bitsandbytes have is imported, and no hub is asked.
        """
        return cls(folder, WITHOUT_US, "", {**os.environ, "HF_HUB_OFFLINE": "1"}, PROGRAM)

    @property
    def pid(self) -> int:
        """The process whose children the commands are."""
        return self._process.pid

    def run(self, folder: Path, *arguments: str, **variables: str) -> Answer:
        """Run `qlora-kit`, or a program, with these arguments in a folder, and more variables."""
        assert self._process.stdin
        assert self._process.stdout
        request = [str(folder), str(self._said), arguments, variables]
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code, seconds = json.loads(self._process.stdout.readline())
        out, err = (Path(f"{self._said}{name}").read_text() for name in ("out", "err"))
        return Answer(code, seconds, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
