"""One server of forked runs for the whole folder, and a reference that never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import Job, Server, result_of


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def job(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny model and its data."""
    return Job(tmp_path_factory.mktemp("job"), server).prepare()


@pytest.fixture(scope="session")
def reference(job: Job) -> dict[str, bytes]:
    """The files of a run that nothing happened to."""
    output = job.directory / "reference"
    outcome = job.run(output)
    assert outcome.code == 0, outcome.output
    return result_of(output)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a run writes; it does not exist yet."""
    return tmp_path / "run"
