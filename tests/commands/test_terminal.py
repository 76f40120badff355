"""Laws of what is printed: it reaches any terminal, does nothing to it, and fails no command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.terminal import Terminal
from qlora_kit.process.streams import plain

HOSTILE = {
    "a title": "\x1b]0;pwned\x07",
    "a cleared screen": "\x1b[2J",
    "a C1 control": "\x9b2J",
    "a line written over": "safe\rEVIL",
    "backspaces": "no\x08\x08yes",
    "right to left": "txt.\u202egpj.exe",
    "an isolate": "\u2066a\u2069",
    "marks of direction": "a\u200e\u200fb\u061c",
    "not seen": "a\u200b\ufeff\xad\U000e0041b",
    "other ends of lines": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "a lone surrogate": "file\udcff",
    "nothing": "\0\x7f",
}
HARMLESS = [
    "naïve 中文 العربية",
    "\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "نم\u200cک",
    "a\n  c",
    "1\xa0000 \u3000x",
    "[bold]x[/] :warning: \\[y]",
]
MAIN = "import sys; from qlora_kit.commands.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_printed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, terminal = HOSTILE[name], Terminal()
    terminal.line(text, text, (text, "bold"))
    terminal.note(text)
    terminal.print(text)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    terminal.show(table)
    terminal.json({text: [text]})
    with reports_errors_of(ValueError(text)) as code:
        assert code == 1
    printed = capsys.readouterr()
    bad = set(HOSTILE[name]) - set("".join(HARMLESS))
    bad = {c for c in bad if not c.isprintable()}
    assert bad
    assert not bad & set(printed.out + printed.err)
    for c in bad - set("\x07\x08\x0b\x0c\r"):  # rich drops these of a table before
        assert ascii(c)[1:-1] in printed.out
    assert json.loads(printed.out.splitlines()[-1]) == {text: [text]}


class reports_errors_of:  # noqa: N801
    """The exit code of a command that raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __enter__(self) -> int:
        @reports_errors
        def main(argv: Sequence[str] | None = None) -> int:
            raise self.error

        return main([])

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.mark.parametrize("text", HARMLESS)
def test_everyday_text_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(text) == text
    Terminal().print(text)
    assert capsys.readouterr().out == f"{text}\n"


class Ascii(io.TextIOWrapper):
    """A stream of an encoding, whatever the machine's."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "gbk"])
def test_what_an_encoding_lacks_is_replaced_and_json_stays_json(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, errors = Ascii(encoding), Ascii(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", errors)

    @reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        Terminal().line("data", "naïve 中 é █ ⟦x⟧ \udcff")
        Terminal().json({"text": "naïve 中 \udcff"})
        raise ValueError("中 é")

    assert main([]) == 1
    line, as_json = stream.text.splitlines()
    assert line.startswith("data      na")
    assert "\\udcff" in line
    assert json.loads(as_json) == {"text": "naïve 中 \udcff"}
    assert errors.text.startswith("error: unexpected ValueError: ")


def run(shell: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell command in a process of its own; `$PY` is this Python."""
    return subprocess.run(
        ["bash", "-c", shell],
        capture_output=True,
        text=True,
        cwd=directory,
        env={
            **os.environ,
            "QK": f"{sys.executable} -c '{MAIN}'",
            "PY": sys.executable,
            **environment,
        },
        check=False,
    )


PRINTS = """
import sys
from functools import partial
from qlora_kit.commands.failure import reports_errors
def main(argv=None):
    import os
    from qlora_kit.commands.terminal import Terminal
    terminal = Terminal()
    for number in range(2000):
        terminal.line("line", f"{number} of some length, so that a pipe is filled soon enough")
    with open("made", "w") as file:
        os.write(file.fileno(), b"whole")
    print("the last word", file=sys.stderr)
    return 0
sys.exit(reports_errors(main, output_is_product=sys.argv[1] == "product")([]))
"""


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 0, "the last word"),
        (">/dev/full", 0, "note: standard output (stdout): No space left on device; going on"),
        ("| head -1 >/dev/null", 0, "the last word"),
        ("| true", 0, "the last word"),
        (">/dev/null 2>&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full 2>/dev/full", 0, ""),
    ],
)
def test_a_command_that_leaves_files_goes_on_whatever_becomes_of_its_output(
    redirection: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    done = run(f"$PY prints.py files {redirection}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    # Nobody's words landed in a file that was opened in the place of a closed stream.
    assert (tmp_path / "made").read_text() == "whole"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 0, "the last word\n"),
        (
            ">/dev/full",
            4,
            "error: standard output (stdout): No space left on device; free some space, or send "
            "the output elsewhere\n",
        ),
        (">/dev/full 2>/dev/full", 4, ""),
        ("| head -1 >/dev/null", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_a_command_whose_product_is_its_output_says_that_it_is_lost(
    redirection: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    done = run(f"$PY prints.py product {redirection}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "reads.py").write_text(
        "import sys; from qlora_kit.commands.failure import reports_errors\n"
        "sys.exit(reports_errors(lambda argv: len(sys.stdin.buffer.read()))([]))\n"
    )
    done = run("$PY reads.py <&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["--help", "finetune --help"])
def test_help_that_cannot_be_written_says_so(arguments: str, tmp_path: Path) -> None:
    done = run(f"$PY -c '{MAIN}' {arguments} >/dev/full", tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith("error: standard output (stdout): No space left on device; ")
    done = run(f"$PY -c '{MAIN}' {arguments} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run(f"$PY -c '{MAIN}' {arguments}", tmp_path, PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_every_word() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = (
        "import sys; from qlora_kit.commands.failure import reports_errors\n"
        "def main(argv):\n"
        "    for number in range(20000): print(f'line {number}')\n"
        "    return 0\n"
        "sys.exit(reports_errors(main)([]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=write) as process, open(read) as got:
        os.close(write)
        assert got.read() == "".join(f"line {number}\n" for number in range(20000))
    assert process.returncode == 0


def test_the_streams_are_as_they_were_after_a_command() -> None:
    before: list[Any] = [sys.stdout, sys.stderr]

    @reports_errors
    def inner(argv: Sequence[str] | None = None) -> int:
        assert sys.stdout is not before[0]
        return 0

    @reports_errors
    def outer(argv: Sequence[str] | None = None) -> int:
        return inner([])

    assert outer([]) == 0
    assert [sys.stdout, sys.stderr] == before
