"""A process that reads exports as everybody does: without this package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import Forks


@pytest.fixture(scope="session")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks.without_us(tmp_path_factory.mktemp("without"))
    yield forks
    forks.close()
