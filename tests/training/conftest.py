"""A tiny model with fresh adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import save_checkpoint

from qlora_kit.base.load import load_base
from qlora_kit.config import LoRAConfig
from qlora_kit.lora.inject import inject_lora


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    directory = tmp_path_factory.mktemp("training") / "base"
    save_checkpoint(directory, intermediate_size=192)
    return directory


@pytest.fixture
def model(base_dir: Path) -> Callable[..., Any]:
    """Makes a model with fresh adapters: `model(bits=4, dropout=0.1)`."""

    def make(bits: int = 16, dtype: str = "fp32", **lora: Any) -> Any:
        loaded, _ = load_base(str(base_dir), bits=bits, dtype=dtype)
        return inject_lora(loaded, LoRAConfig(**{"r": 4, "alpha": 8.0, **lora}), seed=1)

    return make
