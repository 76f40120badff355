"""The page on small cards is true: its options are there, and its plans fit."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from qlora_kit.base.source import SHORT_NAMES
from qlora_kit.commands.plan import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.parsed import fields_of

PAGE = (Path(__file__).parents[2] / "docs" / "small-cards.md").read_text()
DATA = os.environ.get("QLORA_KIT_DATA")
LINES = re.findall(r"^    (qlora-kit plan .*)$", PAGE, re.M)


def test_its_options_exist():
    known = fields_of((BaseConfig, LoRAConfig, TrainingConfig, PlanConfig, ExportConfig))
    named = set(re.findall(r"--(\w+)", PAGE)) - {"no_", "data", "output_dir"}
    assert {name.removeprefix("no_") for name in named} <= known.keys()


def test_its_models_have_names():
    """As they are typed; the plans below are of the same shape."""
    names = re.findall(r"--model (\S+)", PAGE)
    assert len(names) == len(LINES) > 0
    assert {*names} <= SHORT_NAMES.keys()


@pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[-1])
def test_its_plans_fit(line, tmp_path, capsys):
    """Of the shape that they name, whole."""
    options = shlex.split(line)[2:]
    shape = Path(DATA) / "configs" / "llama3_1_8b.json"
    options[options.index("llama3.1-8b")] = str(shape)
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
