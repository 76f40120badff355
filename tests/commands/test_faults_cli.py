"""Bad command lines and configs: each gives its exit code and class, and names the flag, the value
and the remedy, in time, with everything on disk as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import edit_weights, tree_hash
from processor import processor_s

from qlora_kit.commands import main
from qlora_kit.commands.main import COMMANDS
from qlora_kit.errors import (
    AdapterError,
    ConfigError,
    DataError,
    NumericError,
    QloraKitError,
    ResourceError,
    UnsafeInputError,
    error_line,
)

Run = Callable[..., Any]
SHAPES, WEIGHTS = 10.0, 2.0
"""Seconds for what needs the architecture, and for what flags and files alone show."""


@pytest.fixture
def home(tmp_path: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: a base, an adapter, rows and a used directory."""
    shutil.copytree(workshop.base, tmp_path / "base")
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    shutil.copy(workshop.rows, tmp_path / "rows.jsonl")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> list[QloraKitError]:
    """The errors that were printed, in order; the printing itself is the real one."""
    seen: list[QloraKitError] = []

    def note(error: Any) -> str:
        seen.append(error)
        return error_line(error)

    monkeypatch.setattr("qlora_kit.commands.failure.error_line", note)
    return seen


@pytest.fixture
def refused(run: Run, home: Path, raised: list[QloraKitError]) -> Callable[..., str]:
    """Run a command that must be refused; gives the error line."""

    def check(
        kind: type[QloraKitError], *arguments: object, words: tuple[str, ...], seconds: float
    ) -> str:
        before = tree_hash(home)
        began = processor_s()
        answer = run(*arguments)
        took = processor_s() - began
        assert answer.code == kind.exit_code, answer.err
        assert type(raised[-1]) is kind
        line = str(answer.line)
        assert line == error_line(raised[-1])
        assert len(line) <= 400
        for word in words:
            assert word in line
        assert raised[-1].remedy in line
        assert raised[-1].remedy
        assert "Traceback" not in answer.err
        assert tree_hash(home) == before
        assert took < seconds
        return line

    return check


FINETUNE = ("finetune", "--model", "./base", "--data", "rows.jsonl", "--output_dir", "out")


def test_no_or_an_unknown_command_is_refused(refused: Callable[..., str], run: Run) -> None:
    cases = (
        ((), "no command is given"),
        (("finetun",), "unknown command 'finetun', did you mean finetune?"),
        (("exprt", "--bits", "4"), "unknown command 'exprt', did you mean export?"),
        (("--bits", "4"), "unknown command '--bits'"),
    )
    for arguments, words in cases:
        refused(
            ConfigError,
            *arguments,
            words=(words, "name one of finetune, plan, export"),
            seconds=WEIGHTS,
        )
        assert run(*arguments).err.startswith("usage: qlora-kit COMMAND")


def test_a_misspelt_flag_is_told_the_nearest_one(refused: Callable[..., str], run: Run) -> None:
    for flag in ("--learning_rte", "--learning-rte", "--learning_rte=1"):
        words = ("did you mean --learning_rate?", "see `qlora-kit finetune --help`")
        refused(ConfigError, *FINETUNE, flag, words=words, seconds=WEIGHTS)
    assert run(*FINETUNE, "--learning_rte", "1").err.startswith("usage: qlora-kit finetune")
    # The script says the same as the command, and the last line is the error's.
    script = Path(main.__file__).parents[2] / "scripts" / "finetune.py"
    done = subprocess.run(
        [sys.executable, script, "--learning_rte", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown flag --learning_rte, did you")


BAD_VALUES = {
    # Flags, and what the line says.
    "--lora_r 0": "lora_r must be at least 1 and at most 65536, got 0",
    "--lora_r -4": "lora_r must be at least 1 and at most 65536, got -4",
    "--lora_r 1.5": "lora_r must be a whole number (at least 1 and at most 65536), got 1.5",
    "--lora_r abc": "lora_r must be a whole number (at least 1 and at most 65536), got abc",
    "--lora_r 99999999": "lora_r must be at least 1 and at most 65536, got 99999999",
    "--lora_alpha 0": "lora_alpha must be above 0 and at most 1e+09, got 0",
    "--lora_alpha nan": "lora_alpha must be above 0 and at most 1e+09, got nan",
    "--lora_alpha inf": "lora_alpha must be above 0 and at most 1e+09, got inf",
    "--lora_alpha 1e300": "lora_alpha must be above 0 and at most 1e+09, got 1e+300",
    "--lora_alpha -1": "lora_alpha must be above 0 and at most 1e+09, got -1",
    "--learning_rate 0": "learning_rate must be above 0 and at most 1000, got 0",
    "--learning_rate -1e-4": "learning_rate must be above 0 and at most 1000, got -0.0001",
    "--learning_rate nan": "learning_rate must be above 0 and at most 1000, got nan",
    "--learning_rate 1e400": "learning_rate must be above 0 and at most 1000, got inf",
    "--lora_dropout 1.5": "lora_dropout must be at least 0 and below 1, got 1.5",
    "--lora_dropout -0.1": "lora_dropout must be at least 0 and below 1, got -0.1",
    "--lora_dropout 1.0": "lora_dropout must be at least 0 and below 1, got 1",
    "--bits 3": "bits must be 4, 8 or 16, got 3",
    "--quant_type int4": "quant_type must be nf4 or fp4, got int4",
    "--double_quant --bits 8": "double_quant True goes with bits 4 (nf4 or fp4, double_quant on "
    "or off), not with bits 8",
    "--no_double_quant --bits 16": "double_quant False goes with bits 4",
    "--quant_type nf4 --bits 8": "quant_type nf4 goes with bits 4",
    "--max_length 0": "max_length must be at least 2 and at most 10000000, got 0",
    "--batch_size 0": "per_device_train_batch_size must be at least 1 and at most 65536, got 0",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps must be at least 1 and at "
    "most 65536, got 0",
    "--num_train_epochs 0 --max_steps 0": "num_train_epochs 0 with max_steps 0 leaves no step",
    "--device gpu": "device must be auto, cpu, cuda or cuda:N, got gpu",
    "--optim sgd": "optim must be auto, adamw,",
}


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_a_value_out_of_its_range_is_told_the_range(
    refused: Callable[..., str], flags: str
) -> None:
    words = (BAD_VALUES[flags], "correct the values named above")
    refused(ConfigError, *FINETUNE, *flags.split(), words=words, seconds=WEIGHTS)


def test_a_rank_that_no_target_has_room_for_is_refused(refused: Callable[..., str]) -> None:
    # q_proj is 64 x 64 and v_proj 64 x 32.
    words = ("lora_r 65 is above the largest dimension of every target (64)", "give 1 to 32")
    refused(ConfigError, *FINETUNE, "--lora_r", "65", words=words, seconds=SHAPES)


def test_a_rank_above_a_smaller_side_is_one_warning(run: Run, home: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = run(*FINETUNE, "--lora_r", "40", "--max_steps", "1", "--eval_fraction", "0")
    assert answer.code == 0, answer.err
    said = [str(one.message) for one in caught if "lora_r" in str(one.message)]
    said += [line for line in (answer.out + answer.err).splitlines() if "lora_r 40" in line]
    assert len(said) == 1
    assert "lora_r 40 is above the smallest dimension of a target (32)" in said[0]


@pytest.mark.parametrize("targets", ["nope_proj", "q_proj,nope", r".*\.nope_\w+"])
def test_targets_that_match_nothing_are_told_what_there_is(
    refused: Callable[..., str], targets: str
) -> None:
    listed = "q_proj (2), k_proj (2), v_proj (2), o_proj (2), gate_proj (2), up_proj (2), down_proj"
    line = refused(
        ConfigError, *FINETUNE, "--target_modules", targets, words=(listed,), seconds=SHAPES
    )
    name = targets.split(",")[-1]
    assert f"target_modules {name!r} matches no linear of this model" in line


@pytest.mark.parametrize("place", ["base", "base/out", "."])
def test_an_output_over_the_model_is_refused(refused: Callable[..., str], place: str) -> None:
    for more in ((), ("--overwrite",)):
        arguments = ("finetune", "--model", "./base", "--data", "rows.jsonl", "--output_dir", place)
        words = (f"--output_dir {place} overlaps with", "choose another place")
        refused(ConfigError, *arguments, *more, words=words, seconds=SHAPES)


@pytest.mark.parametrize("data", ["data/train.jsonl", "data", "other.jsonl"])
def test_an_output_over_the_rows_is_refused(
    refused: Callable[..., str], home: Path, data: str
) -> None:
    (home / "data").mkdir()
    shutil.copy(home / "rows.jsonl", home / "data" / "train.jsonl")
    shutil.copy(home / "rows.jsonl", home / "other.jsonl")
    more = ("--eval_data", "data/train.jsonl") if data == "other.jsonl" else ()
    arguments = ("finetune", "--model", "./base", "--data", data, "--output_dir", "data", *more)
    words = ("--output_dir data overlaps with", "choose another place")
    refused(ConfigError, *arguments, "--overwrite", words=words, seconds=SHAPES)


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_an_export_over_its_inputs_is_refused(refused: Callable[..., str], place: str) -> None:
    arguments = ("export", "--adapter", "adapter", "--model", "./base", "--output_dir", place)
    words = (f"--output_dir {place} overlaps with", "choose another place")
    refused(ConfigError, *arguments, "--overwrite", words=words, seconds=SHAPES)


def test_an_output_that_is_used_is_refused(refused: Callable[..., str]) -> None:
    words = ("--output_dir used is not empty", "give --overwrite")
    arguments = ("finetune", "--model", "./base", "--data", "rows.jsonl", "--output_dir", "used")
    refused(ConfigError, *arguments, words=words, seconds=SHAPES)
    arguments = ("export", "--adapter", "adapter", "--model", "./base", "--output_dir", "used")
    refused(ConfigError, *arguments, words=words, seconds=SHAPES)


def test_overwrite_replaces_what_was_there_or_leaves_it_all(run: Run, home: Path) -> None:
    command = ("finetune", "--model", "./base", "--output_dir", "used", "--overwrite")
    short = ("--max_steps", "1", "--eval_fraction", "0")
    before = tree_hash(home)
    # A run that fails once the weights are read gives the old content back.
    edit_weights(home / "base", lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    spoilt = tree_hash(home)
    answer = run(*command, "--data", "rows.jsonl", *short)
    assert answer.code == 5, answer.err
    assert "lm_head.weight" in answer.line
    assert tree_hash(home) == spoilt != before
    edit_weights(home / "base", lambda tensors: tensors["lm_head.weight"].fill_(0.01))
    assert run(*command, "--data", "rows.jsonl", *short).code == 0
    assert not (home / "used" / "export.json").exists()
    assert (home / "used" / "adapter_model.safetensors").exists()
    assert {path.name for path in home.iterdir()} == {"base", "adapter", "rows.jsonl", "used"}


def test_a_length_beyond_the_context_is_refused_or_allowed_by_name(
    refused: Callable[..., str], run: Run
) -> None:
    words = ("max_length 129 is above the model's context of 128", "--allow_longer_context")
    refused(ConfigError, *FINETUNE, "--max_length", "129", words=words, seconds=SHAPES)
    more = ("--max_length", "129", "--allow_longer_context", "--max_steps", "1")
    assert run(*FINETUNE, *more, "--eval_fraction", "0").code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() & {"finetune", "export", "generate"}))
def test_cuda_where_there_is_none_is_a_resource(refused: Callable[..., str], command: str) -> None:
    arguments = {
        "finetune": FINETUNE[1:],
        "export": ("--adapter", "adapter", "--model", "./base", "--output_dir", "out"),
        "generate": ("--model", "./base", "--prompt", "x"),
    }[command]
    for device in ("cuda", "cuda:3"):
        words = (f"--device {device}: torch", "use --device cpu")
        refused(ResourceError, command, *arguments, "--device", device, words=words, seconds=SHAPES)


def test_paging_on_the_cpu_is_said_once(run: Run, home: Path) -> None:
    answer = run(
        *FINETUNE, "--device", "cpu", "--optim", "paged_adamw_8bit", "--max_steps", "1",
        "--eval_fraction", "0",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    said = [line for line in (answer.out + answer.err).splitlines() if "paged" in line]
    assert len([line for line in said if line.startswith(("note:", "warning:"))]) == 1


BAD_FILES = {
    "bits: 4\nlora_r: [1\nseed: 3\n": (ConfigError, "run.yaml:3: not YAML", "correct that line"),
    '{"bits": 4,\n "lora_r" 1}': (ConfigError, "run.yaml:2: not YAML", "correct that line"),
    "bits: 4\nlearning_rte: 1\n": (
        ConfigError,
        "run.yaml:2: unknown key learning_rte, did you mean learning_rate?",
        "correct or remove these lines",
    ),
    "bits: 4\nseed: 1\nbits: 8\n": (
        ConfigError,
        "run.yaml:3: bits is set in line 1 already",
        "correct or remove these lines",
    ),
    "bits: 4\nlora_r: !!python/object/apply:os.mkdir [canary]\n": (
        UnsafeInputError,
        "run.yaml:2: the tag tag:yaml.org,2002:python/object/apply:os.mkdir would make an object",
        "remove the tag",
    ),
    'chat_template: "a\\0b"\n': (ConfigError, "chat_template must be a name or a path", "run.yaml"),
    "bits: 3\nlora_r: 0\n": (ConfigError, "bits must be 4, 8 or 16, got 3", "come from run.yaml"),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_config_file_is_refused_with_its_line(
    refused: Callable[..., str], home: Path, text: str
) -> None:
    kind, *words = BAD_FILES[text]
    (home / "run.yaml").write_text(text)
    refused(kind, *FINETUNE, "--config", "run.yaml", words=tuple(words), seconds=WEIGHTS)
    assert not (home / "canary").exists()


def test_an_adapter_that_training_made_not_finite_is_no_broken_file(
    refused: Callable[..., str], home: Path
) -> None:
    # One step of this decay makes every value of A a million times as large: no fp16 number.
    more = ("--weight_decay", "1e3", "--learning_rate", "1e3", "--adapter_dtype", "fp16")
    more += ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    more += ("--max_steps", "1", "--eval_fraction", "0")
    words = ("values that are not finite; train it again", "--learning_rate or weight decay")
    refused(NumericError, *FINETUNE, *more, words=words, seconds=SHAPES)


@pytest.mark.parametrize("command", ["export", "generate", "evaluate"])
def test_another_base_is_refused_before_its_weights_are_read(
    refused: Callable[..., str], run: Run, home: Path, command: str
) -> None:
    more = {
        "export": ("--output_dir", "out", "--verify", "rows.jsonl"),
        "generate": ("--prompt", "x", "--max_new_tokens", "2"),
        "evaluate": ("--data", "rows.jsonl", "--no_exact_match"),
    }[command]
    arguments = (command, "--adapter", "adapter", "--model", "./base", *more)
    # Reading the weights would be a NumericError, which the adapter's comes before.
    edit_weights(home / "base", lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    words = ("was trained on base with other weights than base", "--allow_other_base")
    refused(AdapterError, *arguments, words=words, seconds=SHAPES)
    assert run(*arguments, "--allow_other_base").code == 5
    edit_weights(home / "base", lambda tensors: tensors["lm_head.weight"].fill_(0.01))
    assert run(*arguments, "--allow_other_base").code == 0


def test_whatever_is_named_and_not_there(refused: Callable[..., str], home: Path) -> None:
    os.mkfifo(home / "pipe")
    words: tuple[str, ...] = ("--config no.yaml: No such file", "name a YAML file")
    refused(ConfigError, "finetune", "--config", "no.yaml", words=words, seconds=WEIGHTS)
    words = ("--config pipe: is not a regular file",)
    refused(ConfigError, "finetune", "--config", "pipe", words=words, seconds=WEIGHTS)
    words = ("no.jsonl: no such file",)
    arguments = ("finetune", "--model", "./base", "--data", "./no.jsonl", "--output_dir", "out")
    refused(DataError, *arguments, words=words, seconds=SHAPES)
