"""A result to a repository of the Hugging Face hub, and what would keep it from there, asked early.

All of it goes in one commit, so that nobody finds an index without its weights there. The contents
of large files are sent before it and are kept by their hashes: what the hub has of an upload that
broke off is not sent again. That is `create_commit` of huggingface_hub; its `upload_folder` sends
in the same way, and may divide a folder into several commits.

The token is the environment's or the stored login's: it is huggingface_hub that reads it, and it is
in no message of ours. Names of the hub's answers and errors: huggingface_hub 1.0 to 2.4.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.output import HubConfig
from qlora_kit.errors import ConfigError, ExportError, QloraKitError, ResourceError, excerpt
from qlora_kit.export.adapter_files import CARD
from qlora_kit.process.signals import Stopped

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADAPTER, MODEL = "adapter_config.json", "config.json"
"""Files that say what loads a repository."""
WEIGHTS = re.compile(
    r"((pytorch_)?model(-\d{5}-of-\d{5})?|adapter_model)\.(safetensors|bin)(\.index\.json)?"
)
"""Weights that a loader takes in place of others where both are there."""
LISTED = 4
"""Files that a warning names."""
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
LATER = "try again later, or leave --push_to_hub out and send the result afterwards"


def check_push(options: HubConfig, export_format: str) -> str | None:
    """Refuse what would keep a result of this format from the hub, before any work is done.

    Returns what becomes of files that the repository has already; None where nothing does.
    Errors: `ConfigError` for a repository that is something else, `ResourceError` for a hub that
    cannot be reached, and for what this account may not do, as far as the hub tells.
    """
    repository = options.push_to_hub
    if repository is None:
        return None
    from huggingface_hub import constants, get_token

    called = f"--push_to_hub {repository}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{called}: HF_HUB_OFFLINE is set", "unset it, or leave --push_to_hub out"
        )
    if get_token() is None:
        raise ResourceError(
            f"{called}: there is no token for the hub",
            "set HF_TOKEN or log in with `hf auth login`",
        )
    with _explained(called):
        api = _api()
        there = _repository(api, repository)  # first: it is given up where nobody answers
        account = api.whoami()
    if there is not None:
        _check_there(there, options, export_format, called)
    _check_account(account, repository, called)
    said = "" if there is None else _replaced(there, export_format)
    return f"{called}: {said}" if said else None


def push(options: HubConfig, files: Mapping[str, Path | bytes], kept: Path, again: str) -> str:
    """Send files by their names in the repository, made where there is none; returns its address.

    `kept` is where the result lies, `again` the command that sends it again.
    Errors: `ExportError`, `Stopped`.
    """
    repository = options.push_to_hub
    assert repository is not None
    remedy = f"send it again: {again}"
    said = f"{kept} is written, and not sent to {repository}"
    try:
        return _push(repository, options.hub_private, files)
    except Stopped as stopped:
        raise Stopped(stopped.signal_number, said, remedy) from None
    except Exception as error:
        said += f": {_reason(error)}"
    # The client (2.4) leaves the bar of a file that was not sent to whoever frees it, and the bar
    # then says its last word: that is to come before the line of the error.
    gc.collect()
    raise ExportError(said, remedy)


def folder_files(directory: Path) -> dict[str, Path | bytes]:
    """Every file of a published directory by its name in it, but for hidden ones."""
    names = {path: path.relative_to(directory) for path in sorted(directory.rglob("*"))}
    return {
        name.as_posix(): path
        for path, name in names.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }


def _push(repository: str, private: bool, files: Mapping[str, Path | bytes]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _api()
    there = _repository(api, repository)
    if there is None:
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.model_info(repository)
    names = {sibling.rfilename for sibling in there.siblings or ()}
    # Of an older result with other weights: its files stay in the repository's history.
    old = {name for name in names - files.keys() if WEIGHTS.fullmatch(name)}
    has_weights = any(WEIGHTS.fullmatch(name) for name in files)
    operations: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(old) if has_weights]
    api.create_commit(repository, operations, commit_message="Upload with qlora-kit")
    info = api.model_info(repository, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    for name, file in files.items():
        size = file.stat().st_size if isinstance(file, Path) else len(file)
        if sizes.get(name) != size:
            raise ValueError(f"it has {sizes.get(name, 'none')} of the {size} bytes of {name}")
    return f"{api.endpoint}/{repository}"


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    return HfApi(token=get_token())


def _repository(api: HfApi, repository: str) -> Any:
    """What the hub says of a repository of models; None where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_there(there: Any, options: HubConfig, export_format: str, called: str) -> None:
    """Refuse a repository that others see, or that is loaded as something else."""
    if options.hub_private and there.private is False:
        raise ConfigError(
            f"{called}: this repository is public", "name another one, or give --no_hub_private"
        )
    if not options.hub_private and there.private is True:
        raise ConfigError(
            f"{called}: this repository is private",
            "leave --no_hub_private out, or make it public on the hub",
        )
    names = {sibling.rfilename for sibling in there.siblings or ()}
    is_adapter = export_format == "adapter"
    if ADAPTER in names and not is_adapter and not export_format.startswith("gguf"):
        raise ConfigError(
            f"{called}: it holds an adapter, which loaders take in place of a model",
            "name another repository",
        )
    if is_adapter and MODEL in names and ADAPTER not in names:
        raise ConfigError(f"{called}: it holds a model", "name another repository for the adapter")


def _replaced(there: Any, export_format: str) -> str:
    """What becomes of a repository's files when a result of this format is sent there."""
    names = {sibling.rfilename for sibling in there.siblings or ()}
    gone = sorted(name for name in names if WEIGHTS.fullmatch(name))
    said = ["its README.md is replaced"] if CARD in names else []
    if gone and not export_format.startswith("gguf"):
        listed = gone if len(gone) <= LISTED else [*gone[:LISTED], f"{len(gone) - LISTED} more"]
        said.append(
            f"of its weights ({', '.join(listed)}) those are deleted that the result has not"
        )
    return f"{' and '.join(said)}; its history keeps them" if said else ""


def _check_account(account: Any, repository: str, called: str) -> None:
    """Refuse a token that may not write to the repository's owner, where whoami says so."""
    owner, name = repository.split("/")[0], str(account.get("name"))
    roles = {name.lower(): "admin"} | {
        str(one.get("name")).lower(): one.get("roleInOrg") for one in account.get("orgs") or ()
    }
    if owner.lower() not in roles or roles[owner.lower()] == "read":
        why = "may only read" if owner.lower() in roles else "is no member of"
        raise ResourceError(
            f"{called}: this account, {name}, {why} {owner}",
            f"name {name}/{repository.split('/')[1]}, or log in as another with `hf auth login`",
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    may_write = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scoped = (token.get("fineGrained") or {}).get("scoped") or ()
        may_write = any(
            str((scope.get("entity") or {}).get("name")).lower()
            in (owner.lower(), repository.lower())
            and any("write" in str(one) for one in scope.get("permissions") or ())
            for scope in scoped
        )
    if not may_write:
        raise ResourceError(
            f"{called}: the token of {name} may not write there",
            f"make one that may at {TOKENS_PAGE}, and log in with `hf auth login` or set HF_TOKEN",
        )


@contextlib.contextmanager
def _explained(called: str) -> Iterator[None]:
    """Inside, what the hub's client raises becomes a `ResourceError` with what to do."""
    try:
        yield
    except QloraKitError:
        raise
    except Exception as error:
        answer = _answer(error)
        status = None if answer is None else answer.status_code
        remedy = {
            401: "log in again with `hf auth login`, or correct HF_TOKEN",
            403: "log in as another with `hf auth login`, or set another HF_TOKEN",
            429: "wait some minutes",
        }.get(status or 0, LATER)
        raise ResourceError(f"{called}: {_reason(error)}", remedy) from error


def _reason(error: BaseException) -> str:
    """Why the hub's client failed, in words."""
    answer = _answer(error)
    if answer is not None:
        said = excerpt(answer.headers.get("X-Error-Message") or "", 120)
        status = answer.status_code
        what = {401: "does not know this token", 429: "has had too many requests from here"}
        words = what.get(status, "refuses" if status < 500 else "fails")
        return f"the hub {words} ({status}{f': {said}' if said else ''})"
    chain: list[BaseException] = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(behind)
    if any(type(one).__module__.startswith("http") for one in chain):
        # The names of the client's HTTP library have changed.
        return f"the hub cannot be reached, or the connection broke off ({type(error).__name__})"
    return excerpt(f"{type(error).__name__}: {error}", 160)


def _answer(error: BaseException | None) -> Any:
    """The hub's answer behind an error; None where there was none."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response
