"""What a card alone can show: skipped as a whole where there is none, or it is not asked for.

    QLORA_KIT_TEST_CUDA=1 python -m pytest -n 0 tests/cuda

The laws are functions in `tests/support/device_laws.py`; `tests/test_device_laws.py` runs them on
the CPU, so that their first run on a card is not their first run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("QLORA_KIT_TEST_CUDA") != "1":
        reason = "QLORA_KIT_TEST_CUDA=1 is not set"
    elif not torch.cuda.is_available():
        reason = "there is no CUDA device"
    else:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
