"""What tests share, and that they leave the repository as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads of each would wait for those of the others. It is read
    # when torch is imported, which no test module has done yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A place that tests may fill and clear: the user's own is not theirs. Tiny bases are not kept.
os.environ["QLORA_KIT_CACHE"] = os.path.join(tempfile.gettempdir(), f"qlora-kit-{os.getpid()}")

ON_CARD = os.environ.get("QLORA_KIT_TEST_CUDA") == "1"
"""Whether this session runs what a card alone can show, `tests/cuda`, and nothing else."""
if not ON_CARD:
    # Before torch is imported: laws that compare bits, fork, or hold the CPU's memory against a
    # plan are laws of the CPU, and bitsandbytes takes its library by what it finds.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent
BEFORE = pytest.StashKey[set[str]]()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A process sees a card or it does not: one that does collects the tests of cards alone."""
    here, cards = collection_path.resolve(), ROOT / "tests" / "cuda"
    inside = here.is_relative_to(cards)
    return (not inside and not cards.is_relative_to(here)) or None if ON_CARD else None


def changed_files() -> set[str]:
    """What git says of the files that differ from the commit; nothing outside a checkout."""
    if shutil.which("git") is None:
        return set()
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines()) if done.returncode == 0 else set()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[BEFORE] = changed_files()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A session in which files of the repository changed has failed."""
    if hasattr(session.config, "workerinput"):
        return
    for line in sorted(changed_files() - session.config.stash[BEFORE]):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"FAILED: changed in the repository by the tests: {line}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
