"""What the command tests share: a tiny base, adapters on it, and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import save_checkpoint
from plans_kept import kept_plans
from trained import save_trained, write_rows

from qlora_kit.commands.main import main


@dataclass(frozen=True)
class Workshop:
    """A base of the Llama family, an adapter on it in 4 bits, and a file of rows."""

    base: Path
    adapter: Path
    rows: Path


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    save_checkpoint(folder / "base", "llama_bias", torch.bfloat16)
    save_trained(folder / "base", folder / "adapter", bits=4, dtype="fp32")
    return Workshop(folder / "base", folder / "adapter", write_rows(folder / "rows.jsonl"))


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plans of runs are kept, which many of these tests make again and again."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module", autouse=True)
def _plans_are_kept(plans: Path) -> Iterator[None]:
    with kept_plans(plans):
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run `qlora-kit` in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Answer(code, printed.out, printed.err)

    return call
