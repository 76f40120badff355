"""The tables of `seven_billion.py` for README.md: a line a step, and a line a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
MARK = "<!-- seven_billion -->"
LIMITS = "<!-- seven_billion_limits -->"
GIB = 2**30
LIMITS_HEAD = ["| step | bits | what | found | asked |", "|---|---|---|---|---|"]
HEAD = ["| step | bits | peak RSS | seconds, of the processor | |", "|---|---|---|---|---|"]


def lines(result: dict[str, Any]) -> list[str]:
    """The rows of the table of steps; of one that failed, that it did."""
    found = []
    for bits, steps in result.get("rows", {}).items():
        for name, row in steps.items():
            if "failed" in row:
                found.append(f"| {name} | {bits} | | | **failed** |")
            elif "peak_rss" in row:
                cells = [name, bits, gib(row["peak_rss"])]
                cells += [f"{row['wall_s']:,.0f}, {row['cpu_s']:,.0f}", said(name, row)]
                found.append(f"| {' | '.join(cells)} |")
    return found


def said(name: str, row: dict[str, Any]) -> str:
    """What a step shows beside its bytes and seconds."""
    if name == "plan":
        return f"{gib(row['planned'])} planned"
    if "beside_weights" in row:
        text = f"{gib(row['weights'])} of weights; {row['load_s']:.1f} s in the process"
        return text + (f", files hashed in {row['hash_s']:.1f} s" if "hash_s" in row else "")
    if name == "finetune":
        return f"{gib(row['planned'])} planned; a step {max(row['step_s']):.0f} s"
    if name == "export":
        return f"{gib(row['written'])} written; KL {row['kl']:.0e}"
    if name == "evaluate":
        return f"loss {row['loss']:.3f}"
    return ""


def limit_lines(result: dict[str, Any]) -> list[str]:
    """The rows of the table of limits: what was found, in bold where a limit is not held."""
    found = []
    for bits, limits in result.get("limits", {}).items():
        for one in limits:
            cell = shown(one["found"], one["unit"])
            cells = [one["step"], bits, one["what"], cell if one["held"] else f"**{cell}, missed**"]
            found.append(f"| {' | '.join([*cells, shown(one['asked'], one['unit'])])} |")
    return found


def shown(number: float, unit: str) -> str:
    """What was found or asked in its unit; what has none is so or is not."""
    if unit == "GiB":
        return gib(number)
    if not unit:
        return "yes" if number else "no"
    return {"share": f"{number:.3f}", "off": f"{number:+.1%}", "times": f"{number:.2f}"}[unit]


def gib(number: float) -> str:
    """Bytes as GiB."""
    return f"{number / GIB:.2f} GiB"


def write_page(result: dict[str, Any]) -> None:
    """Put the tables between their marks."""
    _write(MARK, [*HEAD, *lines(result)])
    _write(LIMITS, [*LIMITS_HEAD, *limit_lines(result)])


def _write(mark: str, table: list[str]) -> None:
    before, _, rest = README.read_text().partition(mark)
    _, end, after = rest.partition(mark.replace("<!-- ", "<!-- /"))
    text = "\n".join(table)
    README.write_text(f"{before}{mark}\n{text}\n{end}{after}")
