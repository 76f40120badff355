"""A hub id to a directory of the local hub cache: what is fetched, and what may go wrong.

The hub is asked once what the repository holds. Its files are fetched where the cache lacks them,
and where the disk has room for all of them, config.json before the rest, so that gigabytes do not
come before a refusal; without an answer the cache alone is asked. Only
weights that hold no code and text files are fetched. The token is the environment's or the stored
login's: it is huggingface_hub that reads it, and it is in no message of ours.
"""

from __future__ import annotations

import fnmatch
import glob
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.errors import (
    ModelError,
    QloraKitError,
    ResourceError,
    UnsafeInputError,
    redacted,
)

# What a base consists of: weights that hold no code, and text; not its copies in other layouts.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
EXCEPT = "consolidated*"
TEMPLATES = "additional_chat_templates"
"""The folder of named chat templates beside the default one."""
CONFIG = ["config.json"]


def download(
    hub_id: str,
    revision: str | None,
    weights: bool = True,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The snapshot of a repository in the local hub cache, complete; or all but its weights.

    `check` gets the directory while it may hold no more than config.json, and raises what it likes.
    Errors: `ModelError` for what the hub refuses, `UnsafeInputError` for a repository of pickles,
    `ResourceError` for a hub that cannot be reached, or too little room on the disk.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    called = hub_id + (f" at {revision}" if revision else "")
    if redacted(called) != called:
        # It would be sent in an address, which proxies and servers log.
        raise ModelError(
            f"{called}: a token is given where a name belongs",
            "set HF_TOKEN or log in with `hf auth login`",
        )
    wanted: dict[str, Any] = {"revision": revision}
    try:
        try:
            info = HfApi().model_info(
                hub_id,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except HFValidationError:
            raise
        except Exception as refused:
            # The client raises its HTTP library's errors as well, and which that is has changed.
            try:
                wanted |= {"allow_patterns": PATTERNS if weights else PATTERNS[1:]}
                wanted |= {"ignore_patterns": ["*/*", EXCEPT], "local_files_only": True}
                return Path(snapshot_download(hub_id, **wanted))
            except FileNotFoundError:
                raise refused from None
        held = [file.rfilename for file in info.siblings or ()]
        names = [name for name in held if _is_wanted(name, weights)]
        wanted["allow_patterns"] = [glob.escape(name) for name in names]
        if weights:
            _check_files(info, names, called)
        if check is not None:
            check(Path(snapshot_download(hub_id, **wanted | {"allow_patterns": CONFIG})))
        return Path(snapshot_download(hub_id, **wanted))
    except QloraKitError:
        raise
    except HFValidationError as error:
        raise ModelError(f"{called}: not a hub id", "a hub id is owner/name") from error
    except Exception as error:
        raise _explained(error, called) from error


def _is_wanted(name: str, weights: bool) -> bool:
    """Whether a file of a repository belongs to a base, as it lies in its directory."""
    folder, _, name = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and name.endswith(".jinja")
    patterns = PATTERNS if weights else PATTERNS[1:]
    found = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return found and not fnmatch.fnmatchcase(name, EXCEPT)


def _check_files(info: Any, chosen: Sequence[str], called: str) -> None:
    """Refuse a repository without safetensors, or one that the disk has no room for."""
    from huggingface_hub import constants, try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    if not any(name.endswith(".safetensors") for name in chosen):
        if any(name.endswith((".bin", ".pt", ".pth")) for name in sizes):
            raise UnsafeInputError(
                f"{called}: its weights are pickles, which can run code when they are read",
                "use a repository with safetensors, or convert a copy that you trust",
            )
        raise ModelError(f"{called}: holds no safetensors", "check the name")
    needed = sum(
        sizes[name]
        for name in chosen
        if not isinstance(try_to_load_from_cache(info.id, name, revision=info.sha), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    place = cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{called}: {needed} bytes are to be fetched into {cache}, and {free} are free",
            "free some space, or set HF_HOME to a place that has more",
        )


def _explained(error: BaseException, called: str) -> QloraKitError:
    """Ours for what the hub's client raised."""
    from huggingface_hub import errors

    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, errors.HfHubHTTPError):
        answer = answer.__cause__
    if answer is None:
        return ResourceError(
            f"{called}: the hub cannot be reached and the local hub cache does not hold this model",
            "connect to the network, or give the directory of a downloaded copy",
        )
    status = answer.response.status_code
    if isinstance(answer, errors.GatedRepoError):
        return ModelError(
            f"{called}: the repository is gated, and this account has no access ({status})",
            "accept its terms on the hub and log in with `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return ModelError(f"{called}: no such revision ({status})", "name a branch, tag or commit")
    if isinstance(answer, errors.RepositoryNotFoundError) or status == 404:
        return ModelError(
            f"{called}: the hub has no such repository, or it is private ({status})",
            "check the name; for a private one log in with `hf auth login`, or set HF_TOKEN",
        )
    if status in (401, 403):
        return ModelError(
            f"{called}: the hub refuses this account or its token ({status})",
            "log in again with `hf auth login`, or correct HF_TOKEN",
        )
    if status == 429:
        return ModelError(
            f"{called}: the hub has had too many requests from here ({status})",
            "wait some minutes; with `hf auth login` or HF_TOKEN the limit is higher",
        )
    return ResourceError(
        f"{called}: the hub answers with an error ({status})",
        "try again later, or give the directory of a downloaded copy",
    )
