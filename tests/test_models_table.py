"""docs/models.md is the page of the last result, and both name every type that transformers has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from any_model import MODEL_TYPES
from benchmark import BENCHMARKS

RESULT = json.loads((BENCHMARKS / "results" / "models.json").read_text())
PAGE = BENCHMARKS.parent / "docs" / "models.md"
BITS = ("4", "8", "16")
TOLERANCE = 1e-5
SAME_VERSION = RESULT["measured"]["versions"]["transformers"] == transformers.__version__


@pytest.fixture(scope="module")
def pages() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import models_page
    finally:
        sys.path.remove(str(BENCHMARKS))
    return models_page


@pytest.mark.skipif(not SAME_VERSION, reason="the result is of another transformers")
def test_every_model_type_of_transformers_has_a_row():
    assert set(RESULT["types"]) == set(MODEL_TYPES)


def test_the_page_is_that_of_the_result(pages):
    text = PAGE.read_text()
    assert text == pages.page(RESULT)
    assert all(f"| `{kind}` |" in text for kind in RESULT["types"])


def test_every_type_works_or_is_refused_with_a_reason(pages):
    verdicts = {kind: pages.verdict(row) for kind, row in RESULT["types"].items()}
    assert [kind for kind, found in verdicts.items() if found == "fault"] == []
    assert sum(found == "works" for found in verdicts.values()) >= 60
    for kind, row in RESULT["types"].items():
        if verdicts[kind] == "refused":
            assert any(len(row.get(bits, {}).get("refused", "")) > 20 for bits in BITS), kind


def test_what_works_obeys_the_laws(pages):
    """As figures: a verdict that no figure stands behind would be one that nobody measured."""
    for kind, row in RESULT["types"].items():
        if pages.verdict(row) != "works":
            continue
        assert "4" in row, kind
        for found in (row[bits] for bits in BITS if bits in row):
            assert found["losses"][-1] < found["losses"][0], kind
            limit = max(TOLERANCE, 2 * found.get("autograd_in_fp32", 0))
            assert found["gradients"] <= limit, kind
            for law in ("logits", "peft", "export"):
                assert found[law] <= TOLERANCE, (kind, law)
            assert found["right_padding"] <= limit, kind
            for law, most in (("left_padding", limit), ("packing", TOLERANCE)):
                assert isinstance(found[law], str) or found[law] <= most, (kind, law)


def test_a_law_that_is_broken_shows_on_the_page(pages):
    row = {bits: {"works": True} for bits in BITS}
    assert pages.verdict(row) == "works"
    assert pages.verdict({**row, "8": {"fault": "gradients 0.3"}}) == "fault"
    assert pages.verdict({**row, "8": {"refused": "too large"}}) == "refused"
    assert pages.verdict({**row, "crash": "ended with -9"}) == "fault"
    assert Path(pages.__file__).parent == BENCHMARKS
