"""No token is in any output, log or file, whatever names it: flag, config file or environment.

The hub's own client is in `base/test_hub.py`; here are the commands that write results.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import tree_hash

Run = Callable[..., Any]
TOKEN = "hf_" + "secretSecretSecret" * 2
URL = f"https://user:{TOKEN}@example.invalid/owner/model"
MIRROR = "my-own-secret-of-a-mirror"
"""One that looks like none of the hub's."""
LOGIN = "what-hf-auth-login-has-stored"
SHORT = "--max_steps 1 --eval_fraction 0 --token_cache none"
GOOD = {
    "finetune": f"--model ./base --data rows.jsonl --output_dir out {SHORT}",
    "export": "--adapter adapter --model ./base --output_dir merged --verify rows.jsonl",
    "generate": "--adapter adapter --model ./base --prompt a --max_new_tokens 2",
    "evaluate": "--adapter adapter --model ./base --data rows.jsonl --max_new_tokens 2",
    "show-data": "--model ./base --data rows.jsonl --html page.html --token_cache none",
}


@pytest.fixture
def home(tmp_path: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an adapter and rows, and tokens in the environment."""
    shutil.copytree(workshop.base, tmp_path / "base")
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    shutil.copy(workshop.rows, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MIRROR_API_KEY", MIRROR)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text(LOGIN + "\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def is_free_of_tokens(text: str) -> bool:
    # Nor is a part of one that could be completed by trying.
    return not any(secret in text for secret in (TOKEN, TOKEN[3:20], MIRROR, LOGIN))


@pytest.mark.parametrize("command", GOOD)
def test_a_command_that_works_writes_no_token(run: Run, home: Path, command: str) -> None:
    before = set(home.rglob("*"))
    answer = run(command, *GOOD[command].split(), "--debug")
    assert answer.code == 0, answer.err
    assert is_free_of_tokens(answer.out + answer.err)
    new = [path for path in set(home.rglob("*")) - before if path.is_file()]
    assert bool(new) == (command in ("finetune", "export", "show-data"))
    for path in new:
        assert is_free_of_tokens(path.read_bytes().decode("latin-1")), path


@pytest.mark.parametrize("secret", [TOKEN, MIRROR, LOGIN])
@pytest.mark.parametrize("command", GOOD)
def test_a_command_that_is_given_a_token_does_not_repeat_it(
    run: Run, home: Path, command: str, secret: str
) -> None:
    (home / "key.yaml").write_text(f"bits: 4\nhf_token: {secret}\n")
    (home / "broken.yaml").write_text(f"bits: 4\nmodel: [{secret}\n")
    (home / "value.yaml").write_text(f"bits: {secret}\n")
    (home / "model.yaml").write_text(f"model: {URL.replace(TOKEN, secret)}\n")
    good = GOOD[command].split()
    unnamed = [one for one in good if one not in ("--model", "./base")]
    cases = {
        ("--token", secret): 2,
        (f"--hf_token={secret}",): 2,
        (secret,): 2,
        ("--bits", secret): 2,
        ("--model", secret): None,
        ("--model", URL.replace(TOKEN, secret)): None,
        ("--revision", secret): 2,
        ("--config", "key.yaml"): 2,
        ("--config", "broken.yaml"): 2,
        ("--config", "value.yaml"): 2,
        ("--config", "model.yaml"): None,
    }
    before = tree_hash(home)
    for more, code in cases.items():
        named = unnamed if code is None else good
        answer = run(command, *named, *more, "--debug")
        # What is no model here is refused as one, or as a token where it would be written down.
        assert answer.code in ((2, 3) if code is None else (code,)), (more, answer.err)
        assert is_free_of_tokens(answer.out + answer.err), more
        assert tree_hash(home) == before, more


@pytest.mark.parametrize("secret", [TOKEN, MIRROR, LOGIN])
@pytest.mark.parametrize("command", GOOD)
def test_nor_is_half_of_one_repeated_where_a_value_is_cut(
    run: Run, home: Path, command: str, secret: str
) -> None:
    for length in (0, 1, 30, 45, 55):
        long = "x" * length + secret
        (home / "key.yaml").write_text(f"{long}: 1\n")
        (home / "tag.yaml").write_text(f"bits: !{long} 1\n")
        (home / "broken.yaml").write_text(f"{long}: [\n")
        for more in (
            (long,), ("--bits", long), (f"--debug={long}",), ("--device", long),
            ("--config", "key.yaml"), ("--config", "tag.yaml"), ("--config", "broken.yaml"),
            ("--config", long), (f"--{long}", "1"), (f"--bits={long}",),
        ):  # fmt: skip
            answer = run(command, *GOOD[command].split(), *more, "--debug")
            assert answer.code in (2, 3), (more, answer.err)
            assert not any(
                one in answer.out + answer.err for one in (TOKEN[:10], MIRROR[:10], LOGIN[:10])
            )


@pytest.mark.parametrize("secret", [TOKEN, MIRROR, LOGIN])
@pytest.mark.parametrize("command", GOOD)
def test_a_directory_named_by_a_token_is_not_named_by_it(
    run: Run, home: Path, command: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No option holds it: the base is `.`, whose name is written into results."""
    (home / "base").rename(home / secret)
    monkeypatch.chdir(home / secret)
    for name in ("rows.jsonl", "adapter"):
        (home / name).rename(home / f"near_{name}")
    given = GOOD[command].replace("./base", ".")
    for name in ("rows.jsonl", "adapter", "out", "merged", "page.html"):
        given = given.replace(f" {name}", f" ../near_{name}")
    before = set(home.rglob("*"))
    answer = run(command, *given.split(), "--debug")
    assert answer.code == 0, answer.err
    assert is_free_of_tokens(answer.out + answer.err)
    for path in set(home.rglob("*")) - before:
        if path.is_file():
            assert is_free_of_tokens(path.read_bytes().decode("latin-1")), path


WRITTEN = {
    "finetune": ("--output_dir out-{}", "--data {}.jsonl", "--model ./{}", "--adapter {}"),
    "export": ("--output_dir out-{}", "--adapter {}", "--verify {}.jsonl", "--model ./{}"),
    "show-data": ("--html {}.html", "--data {}.jsonl", "--model ./{}"),
}


@pytest.mark.parametrize("secret", [TOKEN, MIRROR, LOGIN])
@pytest.mark.parametrize("command", WRITTEN)
def test_a_token_in_a_name_that_would_be_written_down_is_refused(
    run: Run, home: Path, command: str, secret: str
) -> None:
    # What is named is there: nothing but the token is wrong.
    shutil.copytree(home / "base", home / secret)
    shutil.copytree(home / "adapter", home / secret, dirs_exist_ok=True)
    shutil.copy(home / "rows.jsonl", home / f"{secret}.jsonl")
    for flag in WRITTEN[command]:
        before = tree_hash(home)
        answer = run(command, *GOOD[command].split(), *flag.format(secret).split())
        assert answer.code == 2, answer.err
        assert f"{flag.split()[0]} holds a token" in answer.line
        assert is_free_of_tokens(answer.out + answer.err)
        assert tree_hash(home) == before
