"""An export that is killed leaves the old export or the new one, whole.

At each call that changes the disk, by what the disk holds then; a sample is killed indeed.
benchmarks/export_kills.py kills at random moments as well, and exports again after each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from export_kills import ENDED, Exports
from families import save_checkpoint
from gguf_models import add_merge
from trained import save_trained, write_rows

from qlora_kit.config.export import FORMATS


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    root = tmp_path_factory.mktemp("exports")
    save_checkpoint(root / "base")
    add_merge(root / "base")
    save_trained(root / "base", root / "adapter", bits=4, dtype="fp32")
    write_rows(root / "rows.jsonl", 4)
    made = Exports(root)
    yield made
    made.close()


@pytest.mark.parametrize("form", FORMATS)
def test_killed_anywhere_an_export_leaves_the_old_one_or_the_new_one(
    exports: Exports, tmp_path: Path, form: str
) -> None:
    place, copies = tmp_path / "here" / "out", tmp_path / "copies"
    exports.put_old(form, place)
    copies.mkdir()
    calls = exports.copied(form, place, copies)
    assert exports.found(form, place) == "new"
    states = sorted(path for path in copies.iterdir() if path.is_dir())
    assert len(states) > 10
    found = [exports.found(form, state / "out") for state in states]
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # once it is the new one it stays
    # What a kill leaves is what was copied.
    draw = random.Random(form)
    state = draw.choice(states[1:])
    at, how = state.name.split("-")
    exports.put_old(form, place)
    assert exports.killed(form, place, int(at), how).code in ENDED
    assert exports.found(form, place) == found[states.index(state)], (calls[int(at) - 1], how)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_holds_no_path_of_this_machine(exports: Exports, form: str) -> None:
    for path in exports.made(form, "new").rglob("*"):
        if path.is_file():
            assert str(exports.root).encode() not in path.read_bytes(), path.name
