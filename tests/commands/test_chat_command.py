"""Laws of `qlora-kit chat`: in a pipe answers alone, on a terminal a prompt and a ^C that stops."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from trained import save_trained

from qlora_kit.base.source import TINY

Run = Callable[..., Any]
SHORT = ("--max_new_tokens", 8, "--dtype", "fp32")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two adapters on `tiny`."""
    root = tmp_path_factory.mktemp("adapters")
    for name, spread in (("a", 0.12), ("b", 0.2)):
        save_trained(Path("tiny"), root / name, spread=spread, bits=4, dtype="fp32")
    return root


@pytest.fixture
def piped(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `qlora-kit chat` with these lines piped in."""

    def call(lines: bytes, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
        return run("chat", *arguments)

    return call


def test_a_pipe_has_the_answers_of_generate_and_nothing_else(
    run: Run, piped: Run, adapters: Path, tmp_path: Path
) -> None:
    flags = (f"--adapter=a={adapters / 'a'}", f"--adapter=b={adapters / 'b'}", *SHORT)
    rows = [{"prompt": "Hello", "adapter": name} for name in ("a", "b", None)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said = run("generate", *flags, "--chat", "--prompts", tmp_path / "rows.jsonl").out
    answers = [json.loads(line) for line in said.splitlines()]
    wanted = {one["adapter"] or "base": f"{one['answer']}\n" for one in answers}
    assert len({*wanted.values()}) == 3
    lines = b"Hello\n/reset\r\n/compare Hello\n/reset\n/use b\nHello"
    answer = piped(lines, *flags)
    assert answer.code == 0
    assert answer.out == "\n".join(
        [wanted["a"], f"base:\n{wanted['base']}a:\n{wanted['a']}", wanted["b"]]
    )
    assert all(line.startswith(("note: ", "warning: ")) for line in answer.err.splitlines())
    assert "note: b answers from here on" in answer.err


@pytest.mark.parametrize(
    ("lines", "flags", "code", "words"),
    [
        (b"/usee b\n", (), 2, "unknown command /usee, did you mean /use?"),
        (b"Hello\n\xff\n", (), 3, "standard input: a line is not UTF-8"),
        (b"", ("--use", "c"), 2, "use c: no adapter has this name"),
        (b"", ("--system", "x", "--plain"), 2, "system is given beside plain"),
        (b"", ("--model", "{workshop}"), 2, "has no chat template; give --plain"),
    ],
)
def test_what_is_wrong_is_the_end_of_a_pipe(
    piped: Run, workshop: Any, lines: bytes, flags: tuple[str, ...], code: int, words: str
) -> None:
    given = (flag.replace("{workshop}", str(workshop.base)) for flag in flags)
    answer = piped(lines, *SHORT, *given)
    assert answer.code == code
    assert words in answer.line


def save_endless(directory: Path) -> Path:
    """`tiny` in a long context, ending at a token that its greedy text never comes to."""
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("chat_template.jinja"))
    never = "<|system|>"
    number = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(never)
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": number, "max_position_embeddings": 10**5},
        "generation_config.json": {"eos_token_id": number},
        "tokenizer_config.json": {"eos_token": never},
    }
    for name, change in changes.items():
        said = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(said | change))
    return directory


def test_on_a_terminal_c_stops_an_answer_and_twice_leaves(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    base = save_endless(tmp_path / "endless")
    command = [sys.executable, "-m", "qlora_kit", "chat", "--model", str(base), "--plain"]
    command += ["--temperature", "0", "--dtype", "fp32", "--max_new_tokens", "90000"]
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"}

    def take_terminal() -> None:
        os.setsid()
        # A suite that runs in the background of a script ignores ^C, and its children would too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    chat = subprocess.Popen(command, env=environment, preexec_fn=take_terminal, **streams)
    os.close(theirs)
    seen, read = b"", 0

    def until(words: bytes) -> None:
        """Go on to behind these words."""
        nonlocal seen, read
        while words not in seen[read:]:
            assert select.select([ours], [], [], 300)[0], seen
            seen += os.read(ours, 4096)
        read = seen.index(words, read) + len(words)

    def interrupt_prompt() -> None:
        """^C at the prompt: Python looks for signals once it waits there, just after showing it."""
        until(b"base> ")
        while Path(f"/proc/{chat.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        os.write(ours, b"\x03")

    try:
        until(b"base> ")
        os.write(ours, b"Tell me all.\r")
        until(b"Tell me all.\r\n")
        until(b" ")
        os.write(ours, b"\x03")
        until(b"stopped; ^C again leaves")
        until(b"base> ")
        os.write(ours, b"/usee\r")
        until(b"did you mean /use?")
        interrupt_prompt()
        until(b"^C again leaves")
        interrupt_prompt()
        assert chat.wait(300) == 130
    finally:
        chat.kill()
        os.close(ours)
    assert b"/help lists commands" in seen
    assert b"cut after" not in seen
    assert b"Traceback" not in seen
