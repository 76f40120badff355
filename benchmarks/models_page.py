"""The page of `benchmarks/models.py`: docs/models.md, a line for each model_type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary(row: Mapping[str, Any]) -> str:
    """What came of a type, in a line."""
    if "crash" in row:
        return f"CRASH {row['crash']}"
    said = []
    for bits in ("4", "8", "16"):
        cell = row.get(bits, {})
        if "works" in cell:
            said.append(f"{bits} works")
        elif "refused" in cell:
            said.append(f"{bits} refused at {cell['refused_at']}: {cell['refused']}")
        else:
            said.append(f"{bits} FAULT {cell.get('fault')}")
    same = {one.partition(" ")[2] for one in said}
    return same.pop() if len(same) == 1 else "; ".join(said)


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a result."""
    path.write_text("\n".join(summary(row) for row in result["types"].values()))
