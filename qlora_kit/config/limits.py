"""The largest values of options that count something.

Every number has a largest value, whatever a run could do with a larger one.
"""

from __future__ import annotations

from qlora_kit.options.checks import between

LARGEST_ALPHA = 1e9
LARGEST_RANK = 2**16
"""As `lora/peft_config.py` takes it from an adapter; far above it a scale is no fp32 number."""
MOST_ROWS, MOST_STEPS, MOST_TOKENS = 2**16, 10**9, 10**7
"""Of rows at a time, of steps of a run, and of tokens in a row: far above what any run has."""
MOST_DRAWN = 10**6
"""Of tokens that are generated."""
MOST_DATA = 10**15
"""Of rows or tokens of a data set whose time is asked for."""
SEEDS = between(0, 2**63 - 1)
