"""Laws of every option: what a number, a path and a text may be, and other tools' values."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from option_groups import OPTION_GROUPS

from qlora_kit.commands.argv import parse
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import SamplingConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.option import Options, alternatives, flag_of, types_of
from qlora_kit.options.yaml_file import read_config

RUN = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)


def fields(*kinds: type) -> Iterator[tuple[type[Options], str]]:
    """Every option that may be of one of the types, with its group."""
    for group in OPTION_GROUPS:
        for field in dataclasses.fields(group):  # type: ignore[arg-type]
            if set(alternatives(types_of(group)[field.name])) & set(kinds):
                yield group, field.name


def named(group: type[Options], name: str) -> dict[str, Any]:
    """The details of an option."""
    found: dict[str, Any] = group.__dataclass_fields__[name].metadata["option"]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(("group", "name"), list(fields(int, float)), ids=lambda v: str(v)[-30:])
def test_every_number_has_a_smallest_and_a_largest_value(group: type[Options], name: str) -> None:
    for value in (10**20, -(10**20), 10**400, 1e308, math.inf, -math.inf, math.nan, "1e400"):
        with pytest.raises(ConfigError, match="must be"):
            group(**{name: value})
    # Where it is text, it is other text: the digits of other scripts are none of ours.
    for value in ("٣", "²", "", "x", "1 2", "9" * 5000, "1__0", "0x10"):
        with pytest.raises(ConfigError, match="must be"):
            group(**{name: value})


def test_a_number_too_small_to_have_an_effect_is_refused() -> None:
    for group, name in (
        (TrainingConfig, "learning_rate"),
        (TrainingConfig, "max_grad_norm"),
        (LoRAConfig, "alpha"),
        (SamplingConfig, "top_p"),
        (SamplingConfig, "temperature"),
    ):
        for value in (1e-320, 5e-324, "1e-300"):
            with pytest.raises(ConfigError, match="at least 1e-"):
                group(**{name: value})  # type: ignore[arg-type]


PATHS = [
    (group, field)
    for group, name in fields(str)
    for field in dataclasses.fields(group)  # type: ignore[arg-type]
    if field.name == name
    and not named(group, name)["repeated"]  # adapters have a test of their own
    and any(word in (named(group, name)["metavar"] or "") for word in ("DIR", "FILE"))
]


@pytest.mark.parametrize(("group", "field"), PATHS, ids=lambda v: getattr(v, "name", ""))
def test_a_path_may_start_with_the_home(
    group: type[Options], field: dataclasses.Field[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    expected = str(tmp_path / "me" / "x")
    assert getattr(group(**{field.name: "~/x"}), field.name) == expected
    name = flag_of(field)
    (tmp_path / "run.yaml").write_text(f"{name}: ~/x\n")
    for argv in ([f"--{name}", "~/x"], ["--config", str(tmp_path / "run.yaml")]):
        assert getattr(parse("any", "", (group,), argv)[group], field.name) == expected
    with pytest.raises(ConfigError, match=f"{name} must be .*~nosuch"):
        group(**{field.name: "~nosuch/x"})
    # A file of that name is named otherwise.
    assert getattr(group(**{field.name: "./~/x"}), field.name) == "./~/x"


def test_every_option_that_names_a_file_is_a_path() -> None:
    found = {flag_of(field) for _, field in PATHS}
    assert {"model", "data", "eval_data", "chat_template", "token_cache", "adapter"} <= found
    assert {"output_dir", "resume_from_checkpoint", "verify", "html"} <= found


def test_a_config_file_named_from_the_home(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    assert parse("any", "", RUN, ["--config=~/run.yaml"])[TrainingConfig].seed == 3


@pytest.mark.parametrize(("group", "name"), list(fields(str)), ids=lambda v: str(v)[-30:])
def test_a_text_is_one_that_can_be_written_and_named(group: type[Options], name: str) -> None:
    for value in ("a\udcff", "\ud800", "a\0b"):
        with pytest.raises(ConfigError, match="must be"):
            group(**{name: value})


# What stands in the file, for which option, and what it is there.
SOURCE = [
    ("seed: 042", 42),
    ("seed: 0008", 8),
    ("max_steps: 1_000", 1000),
    ("seed: '7'", 7),
    ("learning_rate: 1e-4", 1e-4),
    ("learning_rate: 1", 1.0),
    ("output_dir: 1_000", "1_000"),
    ("revision: 0012345", "0012345"),
    ("revision: 1e5", "1e5"),
    ("revision: 2024-13-45", "2024-13-45"),
    ("revision: 2024-01-01", "2024-01-01"),
    ("revision: 12345678901234567890", "12345678901234567890"),
    ("revision: 190:20:30", "190:20:30"),
    ("model: 1.10", "1.10"),
    ("model: 0x1F", "0x1F"),
    ("output_dir: yes", "yes"),
    ("output_dir: =", "="),
    ("output_dir: 'null'", "null"),
    ("output_dir: !!str 5", "5"),
    ("output_dir: !!int 5", "5"),
    ("target_modules: [1, on, 2.50]", ("1", "on", "2.50")),
    ("packing: off", False),
    ("packing: !!bool yes", True),
    ("report_to: [tensorboard, wandb]", "tensorboard,wandb"),
    ("report_to: tensorboard", "tensorboard"),
    ("report_to: []", "none"),
    ("gradient_checkpointing: false", "none"),
    ("gradient_checkpointing: off", "none"),
    ("max_steps: -1", None),
    ("resume_from_checkpoint: true", "auto"),
    ("resume_from_checkpoint: false", None),
    ("seed: ", 42),
    ("seed: null", 42),
    ("seed: !!null x", 42),
]


@pytest.mark.parametrize(("line", "expected"), SOURCE, ids=lambda v: str(v)[:40])
def test_a_value_of_a_file_is_what_its_option_says(
    tmp_path: Path, line: str, expected: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line + "\n")
    parsed = parse("any", "", RUN, ["--config", str(path)])
    name = line.partition(":")[0]
    group = next(one for one in RUN if name in one.__dataclass_fields__)
    assert getattr(parsed[group], name) == expected


REFUSED = {
    "seed: !!timestamp abc": "seed must be a whole number (at least 0 and at most "
    "9223372036854775807), got abc",
    "seed: !!int ''": "seed must be a whole number (at least 0 and at most 9223372036854775807), "
    "got nothing",
    "seed: 12345678901234567890": "seed must be at least 0 and at most 9223372036854775807, got "
    "12345678901234567890",
    "seed: 2024-01-01": "seed must be a whole number",
    "seed: 0x1F": "seed must be a whole number",
    "packing: !!bool abc": "packing must be true or false, got abc",
    "learning_rate: !!float ''": "learning_rate must be a number (above 0 and at most 1000)",
    "learning_rate: .nan": "learning_rate must be a number (above 0 and at most 1000), got .nan",
    "gradient_checkpointing: true": "gradient_checkpointing must be auto, none, selective or "
    "full, got true",
    "gradient_checkpointing: [full]": "gradient_checkpointing must be auto, none, selective or "
    "full, got a list of 1",
    "optim: adamw_torch": "optim must be auto, adamw, ",
    "optim: on": "optim must be auto, adamw, ",
    "bits: four": "bits must be 4, 8 or 16, got four",
    "max_steps: -2": "max_steps must be at least 0 and at most 1000000000, got -2",
    "report_to: [[a]]": "report_to is not a value or a list of names",
    "report_to: [null]": "report_to must be none, or names of trackers with commas between them",
    "resume_from_checkpoint: []": "resume_from_checkpoint must be auto or the directory of a",
    "device: cuda:٣": "device must be auto, cpu, cuda or cuda:N",
    'model: "\\ud800"': "model must be a name or a path in UTF-8",
    'model: "a\\0b"': "model must be a name or a path without NUL characters",
    "output_dir: ~nosuch/x": "output_dir must be a path, and ~name the home of a user here",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_value_that_is_none_of_an_option_is_told_what_is(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        parse("any", "", RUN, ["--config", str(path)])
    assert REFUSED[line] in caught.value.problem


def test_a_numbers_value_is_what_a_program_reads(tmp_path: Path) -> None:
    """Whoever asks the file alone gets numbers as numbers and names as they stand."""
    path = tmp_path / "run.yaml"
    path.write_text("seed: 042\noutput_dir: 042\neval_fraction: 0\npacking: on\nbits: no\n")
    assert read_config(str(path), RUN) == {
        "seed": 42, "output_dir": "042", "eval_fraction": 0.0, "packing": True, "bits": "no"
    }  # fmt: skip


def test_a_whole_number_of_any_length_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"seed must be at least 0 .* got a number of 33220 bits"):
        TrainingConfig(seed=10**10_000)
    with pytest.raises(ConfigError, match=r"max_steps must be .* got a number of"):
        TrainingConfig(max_steps=-(10**10_000))
    with pytest.raises(ConfigError, match="model must be"):
        BaseConfig(model=10**10_000)  # type: ignore[arg-type]


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HOME the system's list of users is asked, as a shell does."""
    monkeypatch.delenv("HOME", raising=False)
    assert DataConfig(data="~/x").data == os.path.expanduser("~/x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "./nowhere", "--prompt", "é"], "error: ./nowhere: no such"),
        (["generate", "--model", "./é", "--prompt", "é"], "error: model must be a path in the"),
        (["finetune", "--model", "tiny", "--config", "é.yaml"], "error: --config "),
        (["finetune", "--model", "tiny", "--config", "run.yaml"], "output_dir must be a path in"),
    ],
)
def test_a_locale_without_the_characters_of_a_path_is_named(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    """With Python's own mending of such locales off, as some images have it."""
    (tmp_path / "run.yaml").write_text("output_dir: é\n", encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    program = "import sys; from qlora_kit.commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=False, env={**os.environ, **plain}
    )
    last = done.stderr.decode("ascii").splitlines()[-1]
    assert words in last
    assert done.returncode in (2, 3)
