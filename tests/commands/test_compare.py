"""Laws of `qlora-kit export --compare`: every form is measured, and none of them is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import tree_hash

from qlora_kit.config.export import MERGED
from qlora_kit.files.publish import mend
from qlora_kit.run import compare

Run = Callable[..., Any]


def compared(run: Run, workshop: Any, *more: object) -> Any:
    """An answer of the command that went well."""
    answer = run(
        "export", "--adapter", workshop.adapter, "--model", workshop.base, "--verify",
        workshop.rows, "--compare", *more,
    )  # fmt: skip
    assert (answer.code, answer.err) == (0, "")
    return answer


def test_every_form_is_listed_beside_the_export_whose_own_distance_is_among_them(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    answer = compared(run, workshop, "--output_dir", tmp_path / "new" / "out")
    report = json.loads((tmp_path / "new" / "out" / "export.json").read_text())
    assert {form["format"] for form in report["compared"]} == set(MERGED)
    exact, original = report["compared"][:2]
    for name in ("kl", "top1_agreement", "max_logit_difference", "tokens"):
        assert exact[name] == report[name]
    assert (exact["merge_base"], original["merge_base"]) == ("dequantized", "original")
    assert exact["kl"] < 1e-6 < 1e-2 < original["kl"]
    sizes = [path.stat().st_size for path in (tmp_path / "new" / "out").iterdir()]
    assert 0 < sum(sizes) - exact["bytes"] < 2**14  # what only a finished export has beside
    for form in report["compared"]:
        assert form["format"] in answer.out
        if "not_available" in form:
            assert f"not available: {form['not_available'][:40]}" in answer.out
        else:
            assert f"{form['kl']:.2e}" in answer.out
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["new", "out"]


def test_alone_it_leaves_nothing(
    run: Run, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compare, "MERGED", ("hf",))  # the others are measured above
    before = tree_hash(workshop.adapter.parent)
    answer = compared(run, workshop)
    assert "hf fp32 dequantized" in answer.out
    assert "exported" not in answer.out
    assert list(tmp_path.iterdir()) == []
    assert tree_hash(workshop.adapter.parent) == before


def test_what_does_not_fit_on_the_disk_is_listed_with_the_reason(
    run: Run, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(os.statvfs("/"))
    found[4] = 0  # blocks that are available
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result(found))
    answer = compared(run, workshop)
    # What is said goes to the hub: no folder of this machine is named.
    assert "not available: a candidate of --compare needs " in answer.out
    assert "and 0 are free" in answer.out
    assert "transformers" not in answer.out


def full(directory: Path) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", str(directory / "model"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (full, "No space left on device"),
        (lambda directory: MemoryError(), "memory ended while it was made or read"),
        (
            lambda directory: RuntimeError(f"{directory}: out of memory"),
            "memory ended while",
        ),
    ],
)
def test_what_the_machine_has_no_room_for_meanwhile_is_listed_too(
    run: Run, workshop: Any, monkeypatch: pytest.MonkeyPatch, error: Any, said: str
) -> None:
    def write(base: Any, adapter: Any, options: Any, directory: Path) -> None:
        (directory / "half").touch()
        raise error(directory)

    monkeypatch.setattr(compare, "MERGED", ("hf",))
    monkeypatch.setitem(compare.FORMATS, "hf", replace(compare.FORMATS["hf"], write=write))
    answer = compared(run, workshop)
    assert answer.out.count(f"not available: {said}") == 2
    assert "/model" not in answer.out


def test_the_next_export_removes_what_a_kill_left(tmp_path: Path) -> None:
    """Where the directory's parents were not there yet, too."""
    target = tmp_path / "new" / "deep" / "out"
    if not (child := os.fork()):
        with compare._folder(target) as folder:
            (folder / "candidate").touch()
            os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.rglob("candidate")] == ["candidate"]
    mend(target)
    assert list(target.parent.iterdir()) == []
    # One that is not killed leaves nothing, and what was there before.
    shutil.rmtree(target.parent)
    with compare._folder(target) as folder:
        assert folder.parent == target.parent
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_what_says_how_to_write_needs_a_place_to_write_to(run: Run, workshop: Any) -> None:
    command = ("export", "--adapter", workshop.adapter, "--compare")
    assert (
        "--merge_base is given, and no --output_dir"
        in run(*command, "--merge_base", "original").line
    )
    assert "measures every form, and writes none" in run(*command, "--max_kl", 1).line
    assert (
        "compare True goes with format"
        in run(*command, "--format", "adapter", "--output_dir", "out").line
    )
