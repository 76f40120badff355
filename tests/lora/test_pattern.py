"""Laws of regexes out of files: `re`'s own answers, and no pattern keeps a command busy."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from families import refused, save_checkpoint
from processor import processor_s
from trained import save_trained

from qlora_kit.base.open import open_base
from qlora_kit.base.pattern import PLAIN, TIME_LIMIT_S, full_matches
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.opening import open_adapter
from qlora_kit.lora.targets import find_targets

NAMES = [f"model.layers.{n}.{part}_proj" for n in (0, 1, 11) for part in ("self_attn.q", "mlp.up")]
HOSTILE = [r"(a+)+$", r"([\w.]+)+!", r"(.|\w)*!", r"(.*)*\1!", r"((((.+)+)+)+)+!"]
"""Each has exponentially many ways to match the first part of a name, and none for the whole."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("patterns")
    save_checkpoint(home / "base")
    save_trained(home / "base", home / "adapter", bits=16, dtype="fp32")
    return home


@pytest.fixture(scope="module")
def model(home):
    return open_base(BaseConfig(str(home / "base"), bits=16)).model


@pytest.mark.parametrize("form", ["{}", r"(.*\.)?({})", r"(?:^|.*?\.){}\.(?P<index>\d+)\..*"])
def test_the_matches_are_those_of_re(form):
    plain = ["q_proj", "model.layers.1.mlp.up_proj", "layers", "^model.layers.0.mlp.up_proj$", ""]
    regexes = [r".*layers\.\d\..*", "(self_attn|mlp).(q|up)_proj", "[^.]*", "lay.{3}", "(?:layers)"]
    assert all(map(PLAIN.fullmatch, plain))
    assert not any(map(PLAIN.fullmatch, regexes))
    for patterns in (plain, regexes, [*plain, *regexes]):
        found = full_matches(patterns, NAMES, form)
        for pattern, matches in zip(patterns, found, strict=True):
            compiled = re.compile(form.format(pattern))
            expected = {name: match for name in NAMES if (match := compiled.fullmatch(name))}
            assert matches == {name: match.groupdict() for name, match in expected.items()}


@pytest.mark.parametrize(
    "patterns", [["q", "(q"], ["\\"], ["a{99999999999999999999}"], ["(" * 9999]]
)
def test_what_is_no_regex_is_named(patterns):
    with pytest.raises(ConfigError, match="is not a regex") as caught:
        full_matches(patterns, NAMES)
    assert repr(patterns[-1][:100]) in caught.value.problem


@pytest.fixture
def impatient(monkeypatch):
    """Less time than a user's pattern has, so that the suite need not wait for all of it."""
    monkeypatch.setattr("qlora_kit.base.pattern.TIME_LIMIT_S", 0.5)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_that_would_take_years_is_stopped(impatient, pattern):
    with pytest.raises(ConfigError, match=r"within 0\.5 s") as caught:
        full_matches([pattern], ["a" * 200 + "!" * (pattern[-1] == "$")])
    assert repr(pattern) in caught.value.problem


def test_the_time_that_a_pattern_has_is_short():
    began = processor_s()
    with pytest.raises(ConfigError, match=f"within {TIME_LIMIT_S:g} s"):
        full_matches(HOSTILE[:1], ["a" * 200 + "!"])
    assert processor_s() - began < 10


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"([\w.]+)+!"},
        {"exclude_modules": r"([\w.]+)+!"},
        {"rank_pattern": {r"([\w.]+)+!": 2}},
        {"alpha_pattern": {r"([\w.]+)+!": 2}},
        {
            "layers_to_transform": [0],
            "layers_pattern": r"([\w.]+)+!",
            "target_modules": ["q_proj"],
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_adapter_with_such_a_pattern_is_refused(impatient, home, model, tmp_path, changes):
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    said = ("adapter_config.json: ", r"([\\w.]+)+!", "without nested repeats")
    with refused(AdapterError, *said, directory=adapter):
        open_adapter(model, adapter, None)


def test_a_flag_with_such_a_pattern_is_refused(impatient, home, model):
    with refused(ConfigError, r"([\\w.]+)+!", directory=home):
        find_targets(model, LoRAConfig(target_modules=r"([\w.]+)+!").target_modules)


def test_many_patterns_are_matched_in_time():
    """A rank for each linear of a large model, as PEFT and we write them."""
    names = [f"model.layers.{n}.mlp.{part}_proj" for n in range(200) for part in "abcdefg"]
    began = processor_s()
    found = full_matches(names, names, r"(.*\.)?({})")
    assert [list(matches) for matches in found] == [[name] for name in names]
    assert processor_s() - began < 10
