"""Laws of the error family: exit codes, the line on stderr, and what never stands in it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qlora_kit import errors
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.main import COMMANDS
from qlora_kit.commands.main import main as entry
from qlora_kit.errors import (
    ERROR_LINE_LIMIT,
    ConfigError,
    DataError,
    ModelError,
    NumericError,
    QloraKitError,
    ResourceError,
    error_line,
    excerpt,
    from_os_error,
    redacted,
)
from qlora_kit.process.signals import Stopped

TOKEN = "hf_" + "AbCdEfGhIj" * 3 + "KLMN"


def raises(error: BaseException) -> Callable[[Sequence[str] | None], int]:
    """A command whose main raises."""

    @reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


def family() -> list[type[QloraKitError]]:
    found = [QloraKitError]
    for kind in found:
        found += kind.__subclasses__()
    return found


# What the contract says, written out again.
CODES = {
    "ConfigError": 2,
    "ModelError": 3,
    "TokenizerError": 3,
    "DataError": 3,
    "AdapterError": 3,
    "CheckpointError": 3,
    "UnsafeInputError": 3,
    "ResourceError": 4,
    "ExportError": 4,
    "NumericError": 5,
}


def test_each_error_has_the_exit_code_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {kind.__name__: kind for kind in family()}
    assert CODES.keys() <= kinds.keys()
    for name, code in CODES.items():
        assert raises(kinds[name]("what", "do this"))([]) == code
        assert capsys.readouterr().err == "error: what; do this\n"


def test_a_good_command_gives_its_own_code() -> None:
    assert reports_errors(lambda argv: 7)([]) == 7


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [("x", "y"), ("x" * 1000, "y"), ("x" * 1000, "y" * 380), ("x", "y" * 1000), ("é" * 900, "ü")],
)
def test_the_line_is_one_line_of_at_most_400_characters(problem: str, remedy: str) -> None:
    line = error_line(ConfigError(problem, remedy))
    assert len(line) <= ERROR_LINE_LIMIT == 400
    assert line.startswith(f"error: {problem[:20]}")
    assert "; " + remedy[:300] in line  # the remedy outlives a long problem
    assert "\n" not in line


def test_a_long_path_leaves_the_reason_in_the_line() -> None:
    path = "./" + "y" * 250 + "/" + "z" * 200
    line = error_line(ModelError(f"{path}: no such directory", f"use owner/name, not {path}"))
    assert len(line) <= 400
    assert ": no such directory; use owner/name, not ./yy" in line
    assert line.startswith("error: ./yyyy")
    assert line.endswith("zzz")
    # Two of them keep their ends each, and short values all of theirs.
    both = f"--output_dir {'a' * 300}/b overlaps with {'c' * 900}/d, which is read"
    line = error_line(ConfigError(both, "choose another place"))
    for part in ("--output_dir aaa", "a/b overlaps with ccc", "c/d, which is read; choose another"):
        assert part in line
    assert 390 <= len(line) <= 400
    short = error_line(ConfigError(f"{'p/' * 100} {'word ' * 30}end", "do this"))
    assert "p/" * 100 in short  # what fits stands as it is
    # What has no long value loses its end.
    many = error_line(ConfigError("wrong " * 200, "correct it"))
    assert many.endswith("...; correct it")


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    line = error_line(ModelError("tensor '\x1b[2J\x07evil\r\nname\udcff'", "fetch it again"))
    assert line == r"error: tensor '\x1b[2J\x07evil name\udcff'; fetch it again"


def test_no_token_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = f"hf_secret_of_mine and 0123456789abcdef and {TOKEN}"
    assert redacted(text) == "*** and *** and hf_***"
    for error in (ConfigError(text, text), RuntimeError(text), OSError(errno.EIO, text, text)):
        raises(error)(["--debug"])
    printed = capsys.readouterr()
    for secret in ("hf_secret", "0123456789abcdef", TOKEN):
        assert secret not in printed.err + printed.out
    # A word that only begins like one stays as it is.
    assert redacted("hf_models/llama") == "hf_models/llama"
    # One within a word is one, and so is a login in an address, whatever it looks like.
    assert redacted(f"my_{TOKEN}.jsonl") == "my_hf_***.jsonl"
    assert redacted("see http://me:pass@proxy:80/x") == "see http://***@proxy:80/x"
    # What is cut is redacted before: half a token is not known as one.
    for length in range(50, 62):
        assert "hf_s" not in excerpt("a" * length + "hf_secret_of_mine")


WORDS = (
    *("changeme", "production", "/home/me/runs", "runs/first", "~/keys/id_rsa", "wikisql"),
    *("a sentence of several words", "http://localhost:8080/path", "internationalization"),
    *("Qwen2.5-7B-Instruct", "./data/train-2024-01-01.jsonl", "data/Llama3/checkpoint-100"),
)
TOKENS = (
    *("hf_" + "abcDEF123" * 4, "sk-proj-" + "x9" * 20, "0123456789abcdef", "ghp_" + "A1b2" * 9),
    *("wJalrXUtnFEMI/K7MDENG/bPxRfiCYz3XAMp1eK", "AKIAIOSFODNN7EXAMPLE", "eyJhbGciOiJIUzI1NiJ9"),
    *("550e8400-e29b-41d4-a716-446655440000", "Zm9vYmFyYmF6cXV4cXV1eA=="),
    *("qWeRtYuIoPaSdFgHjKlZxCvBnM", "my-own-secret-of-a-mirror"),
)


@pytest.mark.parametrize("name", ["DB_PASSWORD", "CACHE_KEY", "SERVICE_TOKEN", "MY_SECRET"])
def test_a_word_or_a_path_in_a_variable_is_no_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in WORDS:
        monkeypatch.setenv(name, value)
        assert redacted(f"--output_dir {value}-run") == f"--output_dir {value}-run"
    for value in TOKENS:
        monkeypatch.setenv(name, value)
        assert value not in redacted(f"--output_dir {value}-run")


def test_a_traceback_comes_with_debug_only(capsys: pytest.CaptureFixture[str]) -> None:
    main = raises(DataError("data.jsonl:3: bad", "correct it"))
    assert main([]) == 3
    assert capsys.readouterr().err == "error: data.jsonl:3: bad; correct it\n"
    assert main(["--debug"]) == 3
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "Traceback (most recent call last):"
    assert printed[-1] == "error: data.jsonl:3: bad; correct it"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EACCES, "you may write to"),
        (errno.EROFS, "you may write to"),
        (errno.EIO, "check that the path"),
    ],
)
def test_what_the_system_refuses_is_a_resource_error(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = from_os_error(OSError(number, os.strerror(number), "/some/file"))
    assert isinstance(error, ResourceError)
    assert error.problem == f"/some/file: {os.strerror(number)}"
    assert remedy in error.remedy
    assert raises(OSError(number, os.strerror(number), "/some/file"))([]) == 4
    assert capsys.readouterr().err == error_line(error) + "\n"


def test_what_is_not_foreseen_is_called_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert raises(KeyError("weight_map"))([]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: unexpected KeyError: 'weight_map'; this is a bug")
    assert "Traceback" not in line


@pytest.mark.parametrize("command", [*COMMANDS, "another"])
def test_memory_is_a_resource_and_the_remedy_has_flags_of_the_command(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (disk, MemoryError(), full):

        def main(argv: Sequence[str] | None = None, error: Exception = error) -> int:
            raise error

        main.__module__ = f"qlora_kit.commands.{command}"
        assert reports_errors(main)([]) == 4
        line = capsys.readouterr().err
        if error is disk:
            told = command in ("finetune", "export", "quantize", "another")
            assert ("--output_dir" in line, "free some space" in line) == (told, True)
            continue
        assert "or raise the limit on memory (ulimit -v)" in line
        flags = set(re.findall(r"--\w+", line))
        if command in COMMANDS:
            with contextlib.suppress(SystemExit):
                entry([command, "--help"])
            assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
        assert bool(flags) == (command not in ("plan", "show_data", "cache", "runs", "another"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_gives_its_code_and_one_line(number: int, code: int) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from qlora_kit.commands.failure import reports_errors\n"
        # A command in a shell's background starts with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@reports_errors\n"
        "def main(argv=None):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(10)\n"
        "    return 0\n"
        "sys.exit(main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        "from qlora_kit.commands.failure import reports_errors\n"
        "@reports_errors\n"
        "def main(argv=None):\n"
        "    for _ in range(100000):\n"
        "        print('a line of text')\n"
        "    return 0\n"
        "sys.exit(main([]))\n"
    )
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "a line of text\n0\n"
    assert done.stderr == ""


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning

    @reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        print(warnings.formatwarning("lora_r 32 is above\n16", UserWarning, "file.py", 3), end="")
        return 0

    assert main([]) == 0
    assert capsys.readouterr().out == "warning: lora_r 32 is above 16\n"
    assert warnings.formatwarning is before


def test_every_error_of_the_package_has_two_halves() -> None:
    error = NumericError("loss is nan", "lower --learning_rate")
    assert (error.problem, error.remedy) == ("loss is nan", "lower --learning_rate")
    assert str(error) == "loss is nan; lower --learning_rate"
    assert issubclass(errors.UnsafeInputError, errors.InputError)


@pytest.mark.parametrize(
    ("name", "text", "secrets"),
    [
        ("token", "what-is-stored\n", ["what-is-stored"]),
        ("token", "\nbehind-an-empty-line\n", ["behind-an-empty-line"]),
        ("token", "the-first-half\nthe-second-half\n", ["the-first-halfthe-second-half"]),
        ("stored_tokens", "[mine]\nhf_token = of-one-login\n\n[b]\nhf_token=of-another\n",
         ["of-one-login", "of-another"]),
    ],
)  # fmt: skip
def test_stored_logins_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, secrets: list[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redacted(f"with {secrets[0]}") == f"with {secrets[0]}"
    (tmp_path / name).write_text(text)  # after the first look
    for secret in secrets:
        assert redacted(f"with {secret} in it") == "with *** in it"


def test_a_login_that_is_no_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "token")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redacted("as it is") == "as it is"


def test_an_end_that_was_asked_for_needs_no_remedy() -> None:
    ended = Stopped(signal.SIGTERM, "the server has ended", remedy="")
    assert error_line(ended) == "error: stopped by SIGTERM: the server has ended"
    assert str(ended) == "stopped by SIGTERM: the server has ended"
