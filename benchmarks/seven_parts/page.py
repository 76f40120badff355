"""The table of `seven_billion.py` for README.md: a line a step, with what is beside its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
MARK = "<!-- seven_billion -->"
GIB = 2**30
HEAD = ["| step | bits | peak RSS | seconds, of the processor | |", "|---|---|---|---|---|"]


def lines(result: dict[str, Any]) -> list[str]:
    """The rows of the table."""
    found = []
    for bits, steps in result.get("rows", {}).items():
        for name, row in steps.items():
            if "peak_rss" in row:
                cells = [name, bits, gib(row["peak_rss"])]
                cells += [f"{row['wall_s']:,.0f}, {row['cpu_s']:,.0f}", said(name, row, steps)]
                found.append(f"| {' | '.join(cells)} |")
    return found


def said(name: str, row: dict[str, Any], steps: dict[str, Any]) -> str:
    """What a step shows beside its bytes and seconds."""
    if name == "plan":
        return f"{gib(row['planned'])} planned"
    if "beside_weights" in row:
        text = f"{gib(row['beside_weights'])} beside the weights"
        if "hash_s" in row:
            text += f"; {row['load_s']:.1f} s in the process, files hashed in {row['hash_s']:.1f} s"
        return text
    beside = steps.get("imports", {})
    if name == "finetune" and beside:
        expected = row["planned"] + beside["finetune"]
        return f"{row['peak_rss'] / expected - 1:+.1%} of plan and imports, {gib(expected)}"
    if name == "kill and resume":
        return "the same losses and adapter" if row["equal_adapters"] else "another adapter"
    if name == "export" and beside:
        weights = steps["load, one file"]["weights"]
        above = row["peak_rss"] - weights - beside["export"]
        kl = row["kl"]
        return f"{gib(above)} beside what is loaded, {gib(row['allowed'])} allowed; KL {kl:.0e}"
    return ""


def gib(number: float) -> str:
    """Bytes as GiB."""
    return f"{number / GIB:.2f} GiB"


def write_page(result: dict[str, Any]) -> None:
    """Put the table between its marks."""
    before, _, rest = README.read_text().partition(MARK)
    _, end, after = rest.partition(MARK.replace("<!-- ", "<!-- /"))
    table = "\n".join([*HEAD, *lines(result)])
    README.write_text(f"{before}{MARK}\n{table}\n{end}{after}")
