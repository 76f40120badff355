"""Tables line up, and pictures are drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_kit.memory.counter import COMPONENTS

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from pictures import ORDER, Bar, draw_bars, draw_step, table


def test_a_table_lines_up():
    assert table(["setting", "GiB"], [["a", "1.25"], ["longer one", "10"]]) == (
        "| setting    |  GiB |\n| ---------- | ---: |\n| a          | 1.25 |\n| longer one |   10 |"
    )


def test_every_component_of_the_device_has_a_colour_of_its_own():
    assert ORDER.keys() == set(COMPONENTS) - {"paged"}
    assert len({colour for _, colour in ORDER.values()}) == len(ORDER)


def test_pictures_are_pngs(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = {"weights_quantized": 3 * 2**30, "activations": 2**30}
    draw_bars(tmp_path / "bars.png", "title", [Bar("4 bits", "none", sizes)])
    intervals = [
        {"phase": phase, "module": "", "at_peak": sizes} for phase in ("forward", "backward")
    ]
    draw_step(tmp_path / "step.png", "title", intervals)
    for name in ("bars.png", "step.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
