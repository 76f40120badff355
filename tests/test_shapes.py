"""The published shapes are taken by this package, and are as large as the models are published."""

from __future__ import annotations

import json
import re

import pytest
from benchmark import BENCHMARKS

from qlora_kit.base.checks import read_config_file

SHAPES = sorted((BENCHMARKS / "shapes").glob("*.json"))


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_published_shape_is_taken(path):
    assert read_config_file(path)["model_type"]


def test_the_page_has_the_parameters_that_were_counted():
    measured = json.loads((BENCHMARKS / "results" / "cards_shapes.json").read_text())["shapes"]
    assert measured.keys() == {path.stem for path in SHAPES}
    page = (BENCHMARKS / "shapes" / "README.md").read_text()
    counts = re.findall(r"([\d., ]+) B \|$", page, re.M)
    published = sorted(number.strip() for cell in counts for number in cell.split(","))
    counted = sorted(f"{one['parameters'] / 1e9:.2f}" for one in measured.values())
    assert published == counted
