"""Laws of `--merge_in_memory`: the adapter answers, the base as before, the distance is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_merged_adapter_answers_beside_the_base_and_its_distance_is_said(
    run: Run, workshop: Any, tmp_path: Path, bits: int
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "Once"}, {"prompt": "Twice", "adapter": None}]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags: tuple[Any, ...] = ("--model", workshop.base, "--adapter", workshop.adapter)
    flags = (*flags, "--dtype", "fp32", "--prompts", tmp_path / "prompts.jsonl")
    flags = (*flags, "--max_new_tokens", 8)
    plain = run("generate", *flags)
    merged = run("generate", *flags, "--merge_in_memory", bits)
    assert (plain.code, merged.code) == (0, 0)
    found, wanted = ([json.loads(one) for one in out.out.splitlines()] for out in (merged, plain))
    assert found[1] == wanted[1]  # the base
    said = re.search(
        rf"note: adapter merged in {bits} bits takes \S+ KiB beside the base; from the adapter "
        r"unmerged: KL (\S+) nats a token, .* over \d+ tokens\n",
        merged.err,
    )
    assert said is not None
    assert "merged" not in plain.err
    if bits == 16:
        # fp32 in another order of additions.
        assert found == wanted
        assert float(said[1]) < 1e-8
    else:
        assert float(said[1]) > 1e-8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "merge_in_memory merges one adapter, and none are given"),
        (("--adapter", "a=x", "--adapter", "b=x"), "merges one adapter, and 2 are"),
        (
            ("--adapter", "{adapter}", "--bits", "16", "--merge_in_memory", "8"),
            "base is held in 16",
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat", "serve", "evaluate"])
def test_what_cannot_be_merged_is_refused(
    run: Run, workshop: Any, command: str, flags: tuple[str, ...], words: str
) -> None:
    given = [str(workshop.adapter) if flag == "{adapter}" else flag for flag in flags]
    asked = {"generate": ["--prompt", "x"], "evaluate": ["--data", workshop.rows]}.get(command, [])
    if "--merge_in_memory" not in flags:
        given += ["--merge_in_memory", "16"]
    answer = run(command, "--model", workshop.base, *asked, *given)
    assert answer.code == 2
    assert words in answer.line
