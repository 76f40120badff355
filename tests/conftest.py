"""What tests share: this folder on the import path, and the material that is not in the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads of each would wait for those of the others. It is read
    # when torch is imported, which no test module has done yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny checkpoints, one of each family; a test that changes one copies it.

    `deep` and `shallow` are Llama's with three layers and with one.
    """
    from families import FAMILIES, save_checkpoint

    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        save_checkpoint(root / family, family)
    save_checkpoint(root / "deep", "llama2", num_hidden_layers=3)
    save_checkpoint(root / "shallow", "llama2", num_hidden_layers=1)
    return root


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real weights and texts; a test that asks for it is skipped without one."""
    if "QLORA_KIT_DATA" not in os.environ:
        pytest.skip("QLORA_KIT_DATA is not set")
    return Path(os.environ["QLORA_KIT_DATA"])
