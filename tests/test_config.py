"""Laws of the options: every check, every conversion, and the round trip of a saved config."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.commands import evaluate, generate
from qlora_kit.commands.argv import parse
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.generation import (
    AdaptersConfig,
    EvaluateConfig,
    GenerateConfig,
    SamplingConfig,
)
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import ON_DEVICE, PLACED, Placement, TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.option import Options, as_flat, flag_of
from qlora_kit.options.yaml_file import dump

GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)
ALL = (*GROUPS, ExportConfig, AdaptersConfig, SamplingConfig, GenerateConfig, EvaluateConfig)

# (group, field, good values, bad values); values as the command line or a file hands them over.
CHECKS: list[tuple[type[Options], str, list[Any], list[Any]]] = [
    (BaseConfig, "model", ["tiny", "a/b", 7], ["", " ", True, ["a"]]),
    (BaseConfig, "bits", [4, 8, 16, "8", " 16 "], [3, 0, -4, "4.0", 4.5, True, "four", "²"]),
    (BaseConfig, "quant_type", ["nf4", "fp4"], ["int4", "NF4", ""]),
    (BaseConfig, "double_quant", [True, False, "on", "no"], [1, "maybe"]),
    (BaseConfig, "skip_modules", ["a,b", ["a"], ("a",), r".*\.q"], ["", [], [1], [""], {}]),
    (BaseConfig, "dtype", ["auto", "bf16", "fp16", "fp32"], ["float", "int8"]),
    (BaseConfig, "device", ["auto", "cpu", "cuda", "cuda:1"], ["", "gpu", "cuda:x", "cpu:0"]),
    (DataConfig, "data", ["sample", "x.jsonl"], [""]),
    (DataConfig, "eval_fraction", [0, 0.5, "0.05"], [1, -0.1, "nan", math.inf, "x", 1.5]),
    (DataConfig, "format", ["auto", "text", "prompt", "instruction", "messages"], ["csv", ""]),
    (DataConfig, "max_length", [2, 4096], [0, 1, -5, "1e3", 2.5]),
    (LoRAConfig, "r", [1, 16, 65536], [0, -4, "1.5", "abc", 99999999, 10**30, "9" * 5000]),
    (LoRAConfig, "alpha", [1, 0.5, "32"], [0, -1, "nan", "inf", math.nan, "1e400", 10**400]),
    (LoRAConfig, "dropout", [0, 0.99], [1.0, 1.5, -0.1, "nan"]),
    (LoRAConfig, "target_modules", ["auto", "a,b", ["a", "b"], ("a",)], ["", [], [1], {}, 5.5j]),
    (TrainingConfig, "learning_rate", [1e-9, "2e-4", 1], [0, -1e-4, "nan", "1e400", "lots"]),
    (TrainingConfig, "lr_scheduler_type", ["cosine", "linear", "constant"], ["step", "Cosine"]),
    (TrainingConfig, "warmup_steps", [0, 0.03, 100], [-1, "nan"]),
    (TrainingConfig, "weight_decay", [0, 0.1], [-0.1, "inf"]),
    (TrainingConfig, "max_grad_norm", [0.3], [0, -1, "nan"]),
    (TrainingConfig, "optim", ["auto", "adamw", "paged_lion_8bit"], ["sgd"]),
    (TrainingConfig, "batch_size", [1, "8"], [0, -1, "two"]),
    (TrainingConfig, "gradient_accumulation_steps", [1], [0, 0.5]),
    (TrainingConfig, "num_train_epochs", [0.5, 3], [-1, "nan", "inf"]),
    (TrainingConfig, "max_steps", [1, -1], [-2, 1.5, 0, 10**10]),
    (TrainingConfig, "gradient_checkpointing", ["auto", "none", "selective", "full"], ["some"]),
    *((TrainingConfig, name, ["auto", True, "off", None], ["some", 2, 0.5]) for name in PLACED),
    (TrainingConfig, "seed", [0, 2**63 - 1], [-1, 2**63, "x"]),
    (OutputConfig, "output_dir", ["out"], [""]),
    (OutputConfig, "logging_steps", [1], [0]),
    (ExportConfig, "format", ["hf", "hf-8bit", "gguf"], ["ggml", "safetensors"]),
    (ExportConfig, "merge_base", ["none", "dequantized", "original"], ["both"]),
    (ExportConfig, "shard_size", [4096], [4095, 0, "4GB"]),
    (ExportConfig, "max_kl", [0, 1e-3], [-1e-9, "nan"]),
    (SamplingConfig, "max_new_tokens", [1], [0, -1]),
    (SamplingConfig, "temperature", [0, 1.5], [-0.1, 101, "nan"]),
    (SamplingConfig, "top_p", [1, 0.01], [0, 1.01, "nan"]),
    (EvaluateConfig, "generate", [0, 5], [-1, "all"]),
    (EvaluateConfig, "batch_size", [1], [0]),
]


@pytest.mark.parametrize(("group", "field", "good", "bad"), CHECKS, ids=lambda v: str(v)[:30])
def test_an_option_takes_what_it_says_and_nothing_else(
    group: type[Options], field: str, good: list[Any], bad: list[Any]
) -> None:
    name = next(flag_of(f) for f in dataclasses.fields(group) if f.name == field)  # type: ignore[arg-type]
    for value in good:
        group(**{field: value})
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            group(**{field: value})
        assert caught.value.exit_code == 2
        assert name in caught.value.problem  # the name that the user typed
        assert len(str(caught.value)) < 300  # a huge value is not repeated


def test_values_arrive_as_their_own_type() -> None:
    made = TrainingConfig(learning_rate="2e-4", max_steps="12", warmup_steps=3)  # type: ignore[arg-type]
    assert (made.learning_rate, made.max_steps, made.warmup_steps) == (2e-4, 12, 3.0)
    assert isinstance(made.max_steps, int)
    assert isinstance(made.warmup_steps, float)
    assert LoRAConfig(target_modules=["q_proj", "v_proj"]).target_modules == ("q_proj", "v_proj")  # type: ignore[arg-type]
    assert BaseConfig(double_quant="off").double_quant is False  # type: ignore[arg-type]


def test_each_method_has_a_learning_rate_of_its_own() -> None:
    for method, rate in {"sft": 2e-4, "dpo": 5e-6}.items():
        alone = TrainingConfig(method=method)
        assert (alone.peak_rate, alone.settled().learning_rate) == (rate, rate)
        assert TrainingConfig(method=method, learning_rate=1e-3).settled().learning_rate == 1e-3


def test_a_message_says_option_range_and_value() -> None:
    for given, line in {
        "0": "lora_r must be at least 1 and at most 65536, got 0",
        "abc": "lora_r must be a whole number (at least 1 and at most 65536), got abc",
        "1.5": "lora_r must be a whole number (at least 1 and at most 65536), got 1.5",
    }.items():
        with pytest.raises(ConfigError) as caught:
            LoRAConfig(r=given)  # type: ignore[arg-type]
        assert caught.value.problem == line


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(learning_rate=0, batch_size=0, optim="sgd", seed=-1)
    for name in ("learning_rate", "per_device_train_batch_size", "optim", "seed"):
        assert f"{name} must be" in caught.value.problem


def test_quant_options_belong_to_four_bits() -> None:
    assert (BaseConfig().quant_type, BaseConfig().double_quant) == ("nf4", True)
    for bits in (8, 16):
        left_alone = BaseConfig(bits=bits)
        assert (left_alone.quant_type, left_alone.double_quant) == (None, None)
        assert not {"quant_type", "double_quant"} & as_flat(left_alone).keys()
        for given in ({"quant_type": "nf4"}, {"double_quant": True}, {"double_quant": False}):
            with pytest.raises(ConfigError, match=r"bits 4 \(nf4 or fp4, double_quant on or off\)"):
                BaseConfig(bits=bits, **given)  # type: ignore[arg-type]


def test_no_step_to_train_is_refused() -> None:
    for options in ({"num_train_epochs": 0}, {"num_train_epochs": 0, "max_steps": 0}):
        with pytest.raises(ConfigError, match="num_train_epochs 0 with max_steps 0"):
            TrainingConfig(**options)  # type: ignore[arg-type]
    assert TrainingConfig(num_train_epochs=0, max_steps=5).max_steps == 5


def test_held_out_rows_are_named_once() -> None:
    with pytest.raises(ConfigError, match=r"eval_fraction 0\.1 is given beside eval_data x\.jsonl"):
        DataConfig(eval_data="x.jsonl", eval_fraction=0.1)


def test_the_length_of_rows_knows_the_context() -> None:
    assert DataConfig().length_in(512) == 512
    assert DataConfig().length_in(8192) == 1024
    assert DataConfig(max_length=512).length_in(512) == 512
    with pytest.raises(ConfigError, match=r"max_length 513 .* 512"):
        DataConfig(max_length=513).length_in(512)
    assert DataConfig(max_length=513, allow_longer_context=True).length_in(512) == 513


@pytest.mark.parametrize("group", ALL)
def test_an_option_is_frozen_and_has_a_help(group: type[Options]) -> None:
    made = group()
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        assert field.metadata["option"]["help"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_placements_are_a_chain_of_what_is_left_to_auto() -> None:
    chain = TrainingConfig().placements_on(True)
    assert chain[0] == ON_DEVICE
    assert [one.flags.count("--") for one in chain] == [0, 1, 2, 3, 4]
    for less, more in itertools.pairwise(chain):
        assert more.flags.startswith(less.flags)
    # The host's memory is the device's own on a CPU, where what is asked for is still done.
    assert TrainingConfig().placements_on(False) == (ON_DEVICE, Placement(mlp_tiled=True))
    asked = TrainingConfig(offload_base=True, offload_embedding=False, tiled_mlp=False)
    for own_memory in (False, True):
        placements = asked.placements_on(own_memory)
        assert placements[0] == Placement(base_on_host=True)
        assert len(placements) == 1 + own_memory
        assert not any(one.embedding_on_host or one.mlp_tiled for one in placements)
    assert chain[-1].words == ("embedding, inputs of layers and base in host memory, MLPs in tiles")


def test_a_placement_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="offload_activations true with gradient_checkpointing"):
        TrainingConfig(offload_activations=True, gradient_checkpointing="none")
    with pytest.raises(ConfigError, match="tiled_mlp true with fused_blocks false"):
        TrainingConfig(tiled_mlp=True, fused_blocks=False)


def test_scaling() -> None:
    assert LoRAConfig(r=16, alpha=32).scaling == 2
    assert LoRAConfig(r=16, alpha=32, use_rslora=True).scaling == 8


# One value that is not the default for every option of a run.
OTHER: dict[str, Any] = {
    "model": "./somewhere",
    "revision": "v1.0",
    "bits": 4,
    "quant_type": "fp4",
    "double_quant": False,
    "dtype": "fp32",
    "device": "cuda:1",
    "data": "rows.jsonl",
    "eval_fraction": 0.25,
    "format": "text",
    "train_on_prompt": True,
    "max_length": 77,
    "allow_longer_context": True,
    "r": 3,
    "alpha": 7.5,
    "dropout": 0.125,
    "target_modules": ("q_proj", "o_proj"),
    "use_rslora": True,
    "adapter_dtype": "fp32",
    "learning_rate": 3e-7,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.5,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "optim": "lion_8bit",
    "batch_size": 3,
    "gradient_accumulation_steps": 5,
    "num_train_epochs": 1.5,
    "max_steps": 9,
    "gradient_checkpointing": "full",
    **dict.fromkeys(PLACED, True),
    "offload_base": False,
    "fused_blocks": True,
    "seed": 2**63 - 1,
    "output_dir": "out: put #1",
    "overwrite": True,
    "logging_steps": 4,
    "report_to": "tensorboard",
    "sample_prompts": 2,
    "compare_bits": True,
}


def changed(group: type[Options]) -> Options:
    """A group in which as many options as can go together are not what they are by default."""
    made = group()
    for field in sorted(dataclasses.fields(group), key=lambda f: f.name not in OTHER):  # type: ignore[arg-type]
        if field.name in OTHER:
            value = OTHER[field.name]
        elif field.type == "bool":
            value = not field.default
        elif isinstance(field.default, int):
            value = field.default + 1
        else:
            continue
        with contextlib.suppress(ConfigError):
            made = dataclasses.replace(made, **{field.name: value})  # type: ignore[type-var]
    return made


def test_a_saved_config_gives_the_same_run(tmp_path: Path) -> None:
    made = [changed(group) for group in GROUPS]
    for group in made:
        for name, value in OTHER.items():
            if hasattr(group, name):
                assert getattr(group, name) == value
    run = RunConfig(*made)  # type: ignore[arg-type]
    path = tmp_path / "config.yaml"
    path.write_text(dump(run.as_flat()))
    parsed = parse("finetune", "", GROUPS, ["--config", str(path)])
    again = RunConfig(*(parsed[group] for group in GROUPS))  # type: ignore[arg-type]
    assert again == run
    assert again.as_flat() == run.as_flat()


def test_a_saved_config_of_the_defaults_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for run in (RunConfig(), RunConfig(base=BaseConfig(bits=8)), RunConfig(BaseConfig(bits=16))):
        path.write_text(dump(run.as_flat()))
        parsed = parse("finetune", "", GROUPS, ["--config", str(path)])
        assert RunConfig(*(parsed[group] for group in GROUPS)) == run  # type: ignore[arg-type]


def test_every_option_survives_the_command_line() -> None:
    for group in ALL:
        made = changed(group)
        argv = []
        for name, value in as_flat(made).items():
            if isinstance(value, bool):
                argv.append(f"--{name}" if value else f"--no_{name}")
            else:
                argv += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
        parsed = parse("any", "", (group,), argv)
        # A list of names is a text on the command line; both mean the same modules.
        if group is LoRAConfig:
            made = dataclasses.replace(made, target_modules="q_proj,o_proj")  # type: ignore[type-var]
        assert parsed[group] == made


def test_names_do_not_clash_within_a_command() -> None:
    for groups in (GROUPS, generate.GROUPS, evaluate.GROUPS):
        seen: dict[str, str] = {}
        for group in groups:
            for field in dataclasses.fields(group):  # type: ignore[arg-type]
                for name in {flag_of(field), field.name, *field.metadata["option"]["aliases"]}:
                    assert name not in seen, f"{name} of {group.__name__} and {seen[name]}"
                    seen[name] = group.__name__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gb", 8 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1048576", 2**20),
        ("1.5k B", None),
        ("8", None),  # GB are meant, and bytes would fit nothing
        ("0.9MiB", None),
    ],
)
def test_sizes(text, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="memory_budget must be a size"):
            TrainingConfig(memory_budget=text)
    else:
        assert TrainingConfig(memory_budget=text).budget_bytes == expected


def test_adapters_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    for given, named in (
        (None, {}),
        ("runs/sql", {"sql": "runs/sql"}),
        (("sql=runs/x", "qa=y=z"), {"sql": "runs/x", "qa": "y=z"}),
        (("runs/sql/", "runs/qa"), {"sql": "runs/sql/", "qa": "runs/qa"}),
        (("a=b", "a=c"), {"a=b": "a=b", "a": "c"}),
        (("a=b",), {"a=b": "a=b"}),
        (("x=~/y",), {"x": str(Path.home() / "y")}),
        (("a", "runs/llama-1.1b"), {"a": "a", "llama-1.1b": "runs/llama-1.1b"}),
    ):
        assert dict(AdaptersConfig(adapter=given).named) == named
    for wrong, words in (
        (("runs/sql", "other/sql"), "adapter other/sql is called sql, as runs/sql is"),
        (("a=x", "a=y"), "adapter a=y is called a, as x is"),
        (("base=x",), "adapter base=x: give it another name"),
        ("runs/base", "adapter runs/base: give it another name"),
        (("=x",), "adapter =x: give it as NAME=DIR"),
        (("no/where=x",), "adapter no/where=x: give it as NAME=DIR"),
        (("a\nb=x",), "give it as NAME=DIR"),
        (("n" * 201 + "=x",), "at most 200 characters"),
        (("a=",), "adapter must be DIR or NAME=DIR"),
        (("x=~nosuchuser/y",), "adapter must be a path, and ~name"),
    ):
        with pytest.raises(ConfigError) as caught:
            AdaptersConfig(adapter=wrong)
        assert words in caught.value.problem
    with pytest.raises(ConfigError, match="allow_other_base goes with adapter"):
        AdaptersConfig(allow_other_base=True)


def test_of_several_adapters_one_is_named() -> None:
    several, one = AdaptersConfig(adapter=("a=x", "b=y")), AdaptersConfig(adapter="x")
    assert (several.chosen("b"), several.chosen("base"), one.chosen(None)) == ("b", None, "x")
    assert AdaptersConfig().chosen(None) is None
    for config, use, words in (
        (several, None, "2 adapters are given, .* give --use with one of a, b, or base"),
        (several, "c", "use c: no adapter has this name; name one of a, b, or base"),
        (AdaptersConfig(), "c", "use c: no adapter has this name; give it as --adapter NAME=DIR"),
    ):
        with pytest.raises(ConfigError, match=words):
            config.chosen(use)
