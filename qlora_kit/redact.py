"""Which texts are secrets here: tokens in the environment's variables, and stored logins.

A variable is asked for by its name, and its value must have a token's form: `KEY=production` or a
path hides nothing and refuses nothing. What a login stored is secret whatever it looks like.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import stat

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "_PAT")
"""How the names of environment variables end whose values may be secrets."""
SECRET_LENGTH, SECRET_LIMIT = 8, 2**16
"""Characters from which on a stored line is a secret, and of a file that is read for some."""
OWN_KEY = "QLORA_KIT_API_KEY"
"""The variable with the key of a server of ours: secret whatever it looks like."""
TOKEN_LENGTH, PHRASE_LENGTH, KEY_LENGTH = 16, 24, 32
"""Characters of a run with digits, of what is no single word, and of a key that may have slashes:
from these on a value is a token."""
PREFIXES = re.compile(
    r"(hf|api_org|sk|pk|rk|gh[a-z]|github_pat|glpat|xox[a-z]|npm|pypi)[-_]|AKIA|ASIA|AIza|ya29\.|eyJ"
)
"""What the tokens of well-known services begin with."""


def known_secrets() -> tuple[str, ...]:
    """Every text that is never to be printed or written, the longest first."""
    named = (value for name, value in os.environ.items() if name.upper().endswith(SECRET_NAMES))
    found = {value for value in named if is_token(value)} | set(_stored_logins()) | _hidden
    if len(own := os.environ.get(OWN_KEY, "")) >= SECRET_LENGTH:
        found.add(own)
    # A part that is replaced before would hide the whole.
    return tuple(sorted(found, key=len, reverse=True))


def hide(secret: str) -> None:
    """Let a text be a secret from here on, such as one that was given by a flag."""
    _hidden.add(secret)


_hidden: set[str] = set()


def is_token(value: str) -> bool:
    """Whether a value has a token's form: no common word, no path, no address, no sentence."""
    if len(value) < TOKEN_LENGTH or re.search(r"\s|://", value):
        return False
    if "/" in value or "\\" in value or value.startswith("~"):
        # A base64 key may have slashes, and changes between kinds of characters as no path does.
        changes = sum(_kind(a) != _kind(b) for a, b in itertools.pairwise(value))
        is_key = re.fullmatch(rf"[A-Za-z0-9+/]{{{KEY_LENGTH},}}=*", value)
        return is_key is not None and changes >= 0.35 * len(value)
    if PREFIXES.match(value):
        return True
    if any(
        re.search("[0-9]", run) for run in re.findall(rf"[A-Za-z0-9]{{{TOKEN_LENGTH},}}", value)
    ):
        return True
    is_word = value.isalpha() and (value.islower() or value.isupper() or value.istitle())
    return len(value) >= PHRASE_LENGTH and not is_word


def _kind(character: str) -> tuple[bool, bool, bool]:
    return character.islower(), character.isupper(), character.isdigit()


def _stored_logins() -> tuple[str, ...]:
    """The tokens that `hf auth login` stored, where the hub's client looks for them."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    found: tuple[str, ...] = ()
    for variable, name in (("HF_TOKEN_PATH", "token"), ("HF_STORED_TOKENS_PATH", "stored_tokens")):
        path = os.path.expanduser(os.path.expandvars(os.environ.get(variable) or f"{home}/{name}"))
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):  # a FIFO would wait for a writer
                found += _secrets_in(path, status.st_mtime_ns)
    return found


@functools.cache
def _secrets_in(path: str, changed: int) -> tuple[str, ...]:
    """The lines of a file (`changed` at that time), their names left out, and all of it as one."""
    with open(path, encoding="utf-8") as file:
        text = file.read(SECRET_LIMIT)
    lines = [
        line.rpartition("=")[2].strip() for line in text.splitlines() if not line.startswith("[")
    ]
    return tuple(one for one in {"".join(lines), *lines} if len(one) >= SECRET_LENGTH)
