"""The published shapes are taken by this package, and are as large as the models are published."""

from __future__ import annotations

import pytest
from benchmark import BENCHMARKS

from qlora_kit.base.checks import read_config_file

SHAPES = sorted((BENCHMARKS / "shapes").glob("*.json"))


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_published_shape_is_taken(path):
    assert read_config_file(path)["model_type"]
