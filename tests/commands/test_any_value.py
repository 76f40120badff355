"""Whatever value an option is given, a command does its work or says what is wrong with it.

A small part of `benchmarks/properties.py`, whose 5,000 cases are in
`benchmarks/results/properties.json`.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from anything import GOOD, WITHOUT_BASE, flags_of, text, value
from benchmark import run_benchmark
from option_groups import OPTION_GROUPS

from qlora_kit.commands.main import COMMANDS
from qlora_kit.errors import ConfigError


def test_any_value_of_any_option_is_taken_or_refused(tmp_path: Path) -> None:
    options = ["--target", "options", "--count", "150", "--seed", "14"]
    result = run_benchmark("properties", tmp_path, *options)
    assert result["findings"] == []
    codes = result["exit_codes"]["options"]
    assert codes.keys() == GOOD.keys()
    for found in codes.values():
        assert "2" in found, f"no value was refused: {codes}"
        # The base is refused where a value was not, but where it is the good one.
        assert {"0", "3"} & found.keys(), f"no value was taken: {codes}"
    assert sum(sum(found.values()) for found in codes.values()) == 150
    assert result["places"]["options"] > 70


def test_any_value_handed_to_a_constructor_is_taken_or_a_config_error() -> None:
    draw, taken, refused = random.Random(3), 0, 0
    places = [
        (group, field.name)
        for group in OPTION_GROUPS
        for field in dataclasses.fields(group)  # type: ignore[arg-type]
    ]
    for _ in range(4_000):
        group, name = draw.choice(places)
        given = text(draw) if draw.random() < 0.3 else value(draw)
        try:
            group(**{name: given})
            taken += 1
        except ConfigError:
            refused += 1
    assert taken > 400
    assert refused > 400


def test_every_command_is_given_values() -> None:
    assert GOOD.keys() == COMMANDS.keys()
    for command in COMMANDS:
        assert len(flags_of(command)) > (3 if command in WITHOUT_BASE else 10), command
