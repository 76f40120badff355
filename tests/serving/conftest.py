from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import KEY, Served, save_adapters, serving


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def server(adapters: dict[str, Path]) -> Iterator[Served]:
    with serving(adapters) as served:
        yield served


@pytest.fixture(scope="session")
def keyed(adapters: dict[str, Path], server: Served) -> Iterator[Served]:
    """One with a key, and with a place for one answer and one that waits."""
    one = {"noise": adapters["noise"]}
    with serving(one, key=KEY, max_batch=1, max_queue=1, grace_s=0.5) as served:
        yield served
