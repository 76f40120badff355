"""Commands in processes that are forked from one which has imported things already.

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
import json, os, sys
exec(sys.argv[1])
for line in sys.stdin:
    folder, said, arguments, variables = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.update(variables)
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(said + name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), handle)
        from qlora_kit.commands.main import main
        code = main(arguments)
        exec(sys.argv[2])
        sys.exit(code)
    _, status, used = os.wait4(child, 0)
    answer = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    print(json.dumps(answer), flush=True)
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

    Its environment is this process's, or the one that is given.
    """

    def __init__(
        self,
        folder: Path,
        before: str = "",
        after: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._said = folder / "said."
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, before, after],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**(environment or os.environ), "PYTHONPATH": str(ROOT)},
        )

    @property
    def pid(self) -> int:
        """The process whose children the commands are."""
        return self._process.pid

    def run(self, folder: Path, *arguments: str, **variables: str) -> Answer:
        """Run `qlora-kit` with these arguments in a folder, and more environment variables."""
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
