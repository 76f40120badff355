"""What the tests of files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that files of the package have to follow."""
    before = os.umask(0o027)
    yield
    os.umask(before)
