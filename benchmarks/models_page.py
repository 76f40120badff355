"""The page of `benchmarks/models.py`: docs/models.md, a line for each model_type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BITS = ("4", "8", "16")
HEAD = """# Every model_type of transformers

For each of the {types} values of `model_type` that transformers {transformers} maps to a causal
language model: a tiny random checkpoint with the family's traits, through the commands.
**{works} work**, {tried}; {refused} are refused{faults}.
Only what transformers builds as a language model of linear layers can be quantized and adapted;
each of the others is refused before it trains, with the reason below.
Where a reason begins with "transformers itself", no tiny checkpoint of the type could be made here
(it may need a package that was not there, or sizes that are not small), so nothing was tried.

What "works" means, for each number of bits, on an fp32 model of random weights:

- its logits are those of transformers' own model on the dequantized weights, to 1e-5;
- a step's loss and the gradients of every adapter are those of torch's autograd in fp64, to 1e-5
  (where autograd in fp32 is itself further off, to twice that; the result says so);
- recompute levels `none`, `selective` and `full` give the same bits;
- padding on the right, which a run has, changes nothing, to 1e-5 (or as far as above); nor does
  padding on the left, but where transformers' own model already differs;
- rows of a pack are as rows alone, to 1e-5, or `--packing` is refused;
- `finetune` trains all linears and its loss falls, PEFT reads the adapter with equal logits,
  `export` writes a model that plain transformers reads with equal logits: of a multimodal
  checkpoint the text model{whole}.

`generate`, `chat`, `serve` and the answers of `evaluate` need a cache of the usual kind: `mamba`,
`mamba2`, `falcon_mamba`, `xlstm` and `recurrent_gemma`, which have states of their own, are refused
there by name.

Random weights say nothing of quality, and a tiny model nothing of speed or memory. What a published
checkpoint of a family has beside these (8-bit floats, remote code, other names) is not looked at.

Made with {versions}, on {processor}, by

{commands}

Everything measured is in [`benchmarks/results/models.json`](../benchmarks/results/models.json).
"""


def verdict(row: Mapping[str, Any]) -> str:
    """`works`, `refused` or `fault`: the worst of its numbers of bits."""
    cells = [row[bits] for bits in BITS if bits in row]
    if "crash" in row or any("fault" in cell for cell in cells):
        return "fault"
    return "works" if cells and all("works" in cell for cell in cells) else "refused"


def summary(row: Mapping[str, Any]) -> str:
    """What came of a type, in a line, for whoever watches the run."""
    if "crash" in row:
        return f"CRASH {row['crash']}"
    said = []
    for bits in BITS:
        cell = row.get(bits)
        if cell is None:
            continue
        if "works" in cell:
            said.append(f"{bits} works")
        elif "refused" in cell:
            said.append(f"{bits} refused at {cell['refused_at']}: {cell['refused']}")
        else:
            said.append(f"{bits} FAULT {cell.get('fault')}")
    return "; ".join(said)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result."""
    measured, types = result["measured"], result["types"]
    by_verdict: dict[str, dict[str, Any]] = {"works": {}, "refused": {}, "fault": {}}
    for kind, row in types.items():
        by_verdict[verdict(row)][kind] = row
    faults = f", {len(by_verdict['fault'])} do not work" if by_verdict["fault"] else ""
    names = ("torch", "bitsandbytes", "transformers", "peft")
    versions = ", ".join(f"{name} {measured['versions'][name]}" for name in names)
    in_all = sum(all(bits in row for bits in BITS) for row in by_verdict["works"].values())
    text = HEAD.format(
        types=len(types),
        works=len(by_verdict["works"]),
        refused=len(by_verdict["refused"]),
        faults=faults,
        transformers=measured["versions"]["transformers"],
        tried="in 4, 8 and 16 bits"
        if in_all == len(by_verdict["works"])
        else f"{in_all} of them in 4, 8 and 16 bits and the others in those that their lines name",
        whole=_whole(by_verdict["works"]),
        commands="\n".join(
            f"- `{_cell(run['command'], 160)}` at commit {run['commit'][:12]}, {run['date']}"
            for run in [*result.get("earlier", []), measured]
        ),
        versions=versions,
        processor=measured["machine"]["processor"],
    )
    lines = [text, "## What works", ""]
    lines += [
        "| model_type | bits | code | in 16 bits | packing | left padding |",
        "|---" * 6 + "|",
    ]
    lines += [_working(kind, row) for kind, row in by_verdict["works"].items()]
    lines += [
        "",
        "`code`: our fused blocks, or the model's own layers. `in 16 bits`: the share of the tiny",
        "model's weights that 4 bits leave as they are, embeddings and head included; it is far",
        "smaller in a real model.",
        "",
        "## What is refused",
        "",
        "| model_type | in linear layers | why |",
        "|---|---|---|",
    ]
    lines += [_refused(kind, row) for kind, row in by_verdict["refused"].items()]
    lines += [
        "",
        "`in linear layers`: the share of the tiny model's weights, where transformers builds one.",
    ]
    if by_verdict["fault"]:
        lines += ["", "## What does not work", "", "| model_type | what was found |", "|---|---|"]
        lines += [
            f"| `{kind}` | {_cell(summary(row))} |" for kind, row in by_verdict["fault"].items()
        ]
    return "\n".join(lines) + "\n"


def _whole(works: Mapping[str, Any]) -> str:
    """Of which types it is refused to write the text model alone."""
    kinds = [
        kind
        for kind, row in works.items()
        if any("text_alone" in row.get(bits, {}) for bits in BITS)
    ]
    if not kinds:
        return ""
    named = ", ".join(f"`{kind}`" for kind in kinds)
    return f", or the whole where transformers takes another tokenizer for that alone ({named})"


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a result."""
    path.write_text(page(result))


def _working(kind: str, row: Mapping[str, Any]) -> str:
    four = row["4"]
    bits = ", ".join(one for one in BITS if one in row)
    code = "fused" if four["code"] == "fused blocks" else "the model's"
    packing = "isolated" if isinstance(four["packing"], float) else "refused"
    left = "equal" if isinstance(four["left_padding"], float) else "transformers' differs"
    return f"| `{kind}` | {bits} | {code} | {four['in_16_bits']:.0%} | {packing} | {left} |"


def _refused(kind: str, row: Mapping[str, Any]) -> str:
    share = f"{row['in_linears']:.0%}" if "in_linears" in row else "-"
    reasons = dict.fromkeys(row[bits]["refused"] for bits in BITS if "refused" in row.get(bits, {}))
    if "transformers" in row:
        if not row["transformers"].startswith("no forward"):
            # There is no checkpoint then, which is what was said of it.
            reasons = {one: None for one in reasons if "mixture of" in one or "tower" in one}
        reasons[f"transformers itself: {row['transformers']}"] = None
    return f"| `{kind}` | {share} | {_cell('; '.join(reasons))} |"


def _cell(text: str, most: int = 400) -> str:
    return " ".join(text.replace("|", "\\|").split())[:most]
