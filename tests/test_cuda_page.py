"""What docs/cuda.md says is shown by a test is shown by one that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)}
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert named - there == set()
    paths = re.findall(r"`((?:tests|benchmarks|qlora_kit|device|base)/[\w/.]*)`", PAGE)
    places = (ROOT, ROOT / "qlora_kit")
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


def test_the_page_has_all_topics_in_their_order() -> None:
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.M)]
    assert numbers == list(range(1, 20))
