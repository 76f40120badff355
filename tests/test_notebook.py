"""examples/qlora_live.ipynb runs as it is, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parent.parent / "examples" / "qlora_live.ipynb"
PICTURES = 6


def said_by(notebook: nbformat.NotebookNode) -> str:
    """All that its cells have printed."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return "".join(
        one.text for cell in cells for one in cell.outputs if one.output_type == "stream"
    )


def pictures(notebook: nbformat.NotebookNode) -> int:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return sum("image/png" in one.get("data", {}) for cell in cells for one in cell.outputs)


@pytest.fixture(scope="module")
def run() -> nbformat.NotebookNode:
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return notebook


def test_it_runs_and_its_numbers_hold(run: nbformat.NotebookNode) -> None:
    said = said_by(run)
    planned = re.findall(r"planned ([\d,]+) bytes, measured ([\d,]+)", said)
    assert len(planned) == 2
    assert all(one == other for one, other in planned)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < 0.1 < before
    missing = re.search(r"rank 8 leaves (\d+)% of the update out, rank 16 (\d+)%", said)
    assert int(missing[2]) < int(missing[1]) < 20
    near, far = (float(re.search(rf"{name}: kl (\S+),", said)[1]) for name in MERGES)
    assert near < far / 10
    assert pictures(run) == PICTURES


MERGES = ("dequantized", "original")


def test_it_is_stored_with_what_it_shows() -> None:
    stored = nbformat.read(PATH, as_version=4)
    assert pictures(stored) == PICTURES
    assert "held-out loss" in said_by(stored)
    assert not any("Traceback" in str(cell.get("outputs")) for cell in stored.cells)
