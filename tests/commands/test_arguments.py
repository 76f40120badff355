"""Laws of the command line and the config file: one option, one name, and nothing is ignored."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processor import processor_s

import qlora_kit
from qlora_kit.commands import evaluate, generate
from qlora_kit.commands.argv import parse
from qlora_kit.commands.main import COMMANDS, main
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.commands import PlanConfig, ServeConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import HubConfig, OutputConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError, UnsafeInputError, error_line
from qlora_kit.options.option import flag_of
from qlora_kit.options.parsed import FOREIGN, fields_of, spellings_of
from qlora_kit.options.yaml_file import CONFIG_LIMIT, read_config

GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)


def options(*argv: str) -> dict[str, Any]:
    """The fields that a finetune command line gave, with their values."""
    parsed = parse("qlora-kit finetune", "", GROUPS, argv)
    return {name: getattr(parsed[group], name) for group in GROUPS for name in parsed.given[group]}


def problem(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse("qlora-kit finetune", "", GROUPS, argv)
    assert len(error_line(caught.value)) <= 400
    return caught.value.problem


def test_hyphens_underscores_equal_signs_and_old_names_are_one_flag() -> None:
    for argv in (
        ["--per_device_train_batch_size", "3"],
        ["--per-device-train-batch-size", "3"],
        ["--per_device-train_batch-size=3"],
        ["--batch_size=3"],
        ["--batch-size", "3"],
    ):
        assert options(*argv) == {"batch_size": 3}
    old_names = {
        "--model_name_or_path x": {"model": "x"},
        "--dataset x": {"data": "x"},
        "--max_seq_length 5": {"max_length": 5},
        "--warmup_ratio 0.1": {"warmup_steps": 0.1},
        "--overwrite_output_dir": {"overwrite": True},
    }
    for line, expected in old_names.items():
        assert options(*line.split()) == expected


def test_what_transformers_dropped_and_we_do_not_have_is_unknown() -> None:
    for flag in ("--evaluation_strategy", "--save_safetensors", "--load_in_4bit"):
        assert f"unknown flag {flag}" in problem(flag, "x")


def test_a_switch_goes_on_and_off() -> None:
    assert options("--use_rslora") == {"use_rslora": True}
    assert options("--no_use_rslora") == {"use_rslora": False}
    assert options("--no-double-quant") == {"double_quant": False}
    assert options("--double_quant", "--no_double_quant") == {"double_quant": False}
    for said in ("true", "ON", "yes"):
        assert options(f"--use_rslora={said}") == options("--use_rslora", said)
        assert options(f"--use_rslora={said}") == {"use_rslora": True}
    for said in ("false", "off", "No"):
        assert options(f"--packing={said}") == options("--packing", said) == {"packing": False}
    assert "--use_rslora must be true or false, got 'maybe'" in problem("--use_rslora=maybe")
    assert "--no_packing takes no value, got 'true'" in problem("--no_packing=true")


def test_a_value_may_look_like_a_number_or_a_flag_of_another_tool() -> None:
    assert options("--output_dir", "-x") == {"output_dir": "-x"}
    assert options("--output_dir", "--x") == {"output_dir": "--x"}
    assert options("--output_dir=--bits") == {"output_dir": "--bits"}
    assert "lora_alpha must be above 0 and at most 1e+09, got -1" in problem("--lora_alpha", "-1")
    assert "learning_rate must be above 0" in problem("--learning_rate", "-1e-4")


def test_a_missing_value_is_not_taken_from_the_next_flag() -> None:
    assert "--model needs a value" in problem("--model")
    assert "--model needs a value, and --bits is a flag" in problem("--model", "--bits", "4")


def test_a_value_that_ends_like_a_flag_is_a_value() -> None:
    for name in ("./model", "../adapter", "a_bits", "-_seed"):
        groups = (BaseConfig,)
        assert parse("finetune", "", groups, ["--model", name])[BaseConfig].model == name


def test_what_is_no_flag_is_refused() -> None:
    for word in ("data.jsonl", "-m", "--", ""):
        assert f"unexpected argument {word!r}" in problem(word)


def test_all_unknown_flags_are_named_with_the_closest_known_one() -> None:
    said = problem("--learning_rte", "1", "--lora-rr=3", "--zzz", "--bits", "4")
    assert said == (
        "unknown flag --learning_rte, did you mean --learning_rate?; "
        "unknown flag --lora-rr, did you mean --lora_r?; unknown flag --zzz"
    )


MEANT = {
    "--lr": "--learning_rate",
    "--load_in_4bit": "--bits 4",
    "--load-in-8bit": "--bits 8",
    "--bf16": "--dtype bf16",
    "--epochs": "--num_train_epochs",
    "--micro_batch_size": "--per_device_train_batch_size",
    "--grad_accum": "--gradient_accumulation_steps",
    "--lora_rank": "--lora_r",
    "--lora_target": "--target_modules",
    "--lora_target_linear": "--target_modules all-linear",
    "--cutoff_len": "--max_length",
    "--sequence_len": "--max_length",
    "--sample_packing": "--packing",
    "--base_model": "--model",
    "--train_on_inputs": "--train_on_prompt",
    "--assistant_only_loss": "--no_train_on_prompt",
    "--bnb_4bit_quant_type": "--quant_type",
    "--bnb_4bit_use_double_quant": "--double_quant",
    "--bnb_4bit_compute_dtype": "--dtype",
    "--use_gradient_checkpointing": "--gradient_checkpointing",
    "--eval_strategy": "--eval_steps",
    "--evaluation_strategy": "--eval_steps",
    "--save_strategy": "--save_steps",
    "--load_best_model_at_end": "--load_best",
    "--val_set_size": "--eval_fraction",
    "--random_state": "--seed",
    "--optimizer": "--optim",
    "--lr_scheduler": "--lr_scheduler_type",
    "--template": "--chat_template",
    "--adapter_name_or_path": "--adapter",
    "--wandb_project": "--report_to wandb",
    "--learning_rte": "--learning_rate",
    "--output": "--output_dir",
}


@pytest.mark.parametrize("flag", MEANT)
def test_a_flag_of_another_tool_names_the_one_that_is_meant(flag: str) -> None:
    meant = MEANT[flag]
    assert problem(flag, "1") == f"unknown flag {flag}, did you mean {meant}?"
    name, _, value = meant.partition(" ")
    # What is advised is a flag of this command, and takes that value.
    assert options(*([name, value] if value else []), "--seed", "1")
    assert any(
        name == f"--{one}" or name == f"--no_{one}" for one in spellings_of(fields_of(GROUPS))
    )


def test_every_name_of_another_tool_leads_to_an_option_and_hides_none() -> None:
    single = [HubConfig, ExportConfig, PlanConfig, ServeConfig]
    commands = [*GROUPS, *single, *generate.GROUPS, *evaluate.GROUPS]
    known = {flag_of(field) for group in commands for field in dataclasses.fields(group)}
    planned = {"dry_run"}  # named in the contract, and not there yet
    for ours, theirs in FOREIGN.items():
        assert not ours or ours.split()[0].removeprefix("no_") in known | planned, ours
        assert len(set(theirs.split())) == len(theirs.split())


def test_what_no_option_is_like_is_not_answered_by_what_looks_like_it() -> None:
    for flag in ("--neftune_noise_alpha", "--lora_bias", "--hub_token", "--use_dora"):
        assert problem(flag) == f"unknown flag {flag}"


def test_a_key_of_another_tool_is_told_as_a_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 1\nload_in_4bit: true\nassistant_only_loss: true\n")
    assert problem("--config", path) == (
        f"{path}:1: unknown key lr, did you mean learning_rate?; "
        f"{path}:2: unknown key load_in_4bit, did you mean bits: 4?; "
        f"{path}:3: unknown key assistant_only_loss, did you mean train_on_prompt: false?"
    )


def test_a_command_names_flags_that_it_has() -> None:
    for flag in ("--max_tokens", "--max_length"):
        with pytest.raises(ConfigError, match=f"{flag}, did you mean --max_new_tokens?"):
            parse("qlora-kit generate", "", generate.GROUPS, [flag, "1"])
    with pytest.raises(ConfigError) as caught:
        parse("qlora-kit generate", "", generate.GROUPS, ["--lr", "1"])
    assert caught.value.problem == "unknown flag --lr"


@pytest.mark.parametrize("arguments", [["--version"], *([c, "--version"] for c in COMMANDS)])
def test_the_version_is_the_packages(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    assert (code, capsys.readouterr().out) == (0, f"qlora-kit {qlora_kit.__version__}\n")


def test_all_wrong_values_are_named_together_whatever_their_group() -> None:
    said = problem("--bits", "3", "--lora_r", "0", "--learning_rate", "0", "--max_length", "1")
    for name in ("bits", "lora_r", "learning_rate", "max_length"):
        assert f"{name} must be" in said


def test_an_error_stays_short_however_much_is_wrong() -> None:
    flags = [f"--unknown_flag_number_{n}" for n in range(200)]
    assert len(problem(*flags)) > 400  # cut in the line, which `problem` measures
    problem("--model", "x" * 5000, "--bits", "3")
    problem("--" + "y" * 5000)
    problem("z" * 5000)


def test_an_abbreviation_is_not_guessed() -> None:
    assert "unknown flag --learning" in problem("--learning", "1e-4")


def write(directory: Path, text: str | bytes) -> str:
    path = directory / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_config_file_holds_the_same_names(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# a comment\nmodel: ./base\nlora-r: 8\nbatch_size: 2\nlearning_rate: 2e-4\n"
        "target_modules: [q_proj, v_proj]\ndouble_quant: no\nmax_steps:\n",
    )
    assert options("--config", path) == {
        "model": "./base",
        "r": 8,
        "batch_size": 2,
        "learning_rate": 2e-4,
        "target_modules": ("q_proj", "v_proj"),
        "double_quant": False,
    }


@pytest.mark.parametrize(
    "text",
    ['{"bits": 8, "lora_r": 4}', "\ufeffbits: 8\r\nlora_r: 4\r\n", "---\nbits: 8\nlora_r: 4"],
)
def test_json_a_byte_order_mark_and_crlf_are_read(tmp_path: Path, text: str) -> None:
    assert options("--config", write(tmp_path, text)) == {"bits": 8, "r": 4}


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for text in ("", "\n# only a comment\n", "---\n"):
        assert options("--config", write(tmp_path, text)) == {}


def test_a_flag_beats_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_r: 8\nuse_rslora: true\nbits: 8\n")
    given = options("--lora_r", "4", "--config", path, "--no_use_rslora")
    assert given == {"r": 4, "use_rslora": False, "bits": 8}


def test_two_options_of_one_name_belong_to_the_command(tmp_path: Path) -> None:
    # export's --dtype is that of the export, not of the base.
    for argv in (["--dtype", "fp32"], ["--config", write(tmp_path, "dtype: fp32")]):
        parsed = parse("qlora-kit export", "", (ExportConfig, BaseConfig), argv)
        assert parsed[ExportConfig].export_dtype == "fp32"
        assert parsed[BaseConfig].dtype == "auto"
        assert parsed.given[BaseConfig] == frozenset()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("bits: 4\nlora_r: [1\nseed: 3\n", 3, "not YAML"),
        ("bits: 4\n\tlora_r: 1\n", 2, "not YAML"),
        ("bits: 4\nlora_r: *nowhere\n", 2, "not YAML"),
        ("bits: 4\nseed: 1\n---\nbits: 8\n", 3, "not YAML"),
        ("bits: 4\nlearning_rte: 1\n", 2, "unknown key learning_rte, did you mean learning_rate?"),
        ("bits: 4\nseed: 1\nbits: 8\n", 3, "bits is set in line 1 already"),
        ("batch_size: 1\nper_device_train_batch_size: 2\n", 2, "is set in line 1 already"),
        ("config: other.yaml\n", 1, "unknown key config"),
        ("debug: true\n", 1, "unknown key debug"),
        ("lora_r: {a: 1}\n", 1, "lora_r is not a value or a list of names"),
        ("lora_r: [[1]]\n", 1, "lora_r is not a value or a list of names"),
        ("? [a, b]\n: 3\n", 1, "unknown key"),
        ("<<: {bits: 4}\n", 1, "unknown key <<"),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    path = write(tmp_path, text)
    said = problem("--config", path)
    assert f"{path}:{line}: " in said
    assert words in said


@pytest.mark.parametrize(
    "text",
    [
        b"bits: 4\xff",
        "bits: 4".encode("utf-16"),
        b"bits: \x00",
        b"- bits\n- 4\n",
        b"just text\n",
        b"[" * 5000,
        b"lora_r: " + b"9" * 5000,
        b"[[1], [2]]",
        b"x" * 2_000_000,
    ],
    ids=range(9),
)
def test_a_file_that_is_no_config_is_a_config_error(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path, text)
    assert path in problem("--config", path) or "lora_r must be" in problem("--config", path)


@pytest.fixture
def alone() -> Iterator[None]:
    """What other tests have left in memory is not gone through, as it is not in a command."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("alone")
def test_a_file_of_any_content_is_read_or_refused_at_once(tmp_path: Path) -> None:
    """Two seconds of processor time at most, for the largest file that is taken."""
    for text in (
        "\n".join(f"k{n}: 1" for n in range(CONFIG_LIMIT // 10)),
        "model: [" + ", ".join("a" * (CONFIG_LIMIT // 3 - 10)) + "]",
        "[" * CONFIG_LIMIT,
        "- " * (CONFIG_LIMIT // 2),
        "model: " + "x" * (CONFIG_LIMIT - 10),
    ):
        path = write(tmp_path, text)
        began = processor_s()
        problem("--config", path)
        assert processor_s() - began < 2, text[:20]
    many = [f"--k{n}" for n in range(5000)]
    began = processor_s()
    problem(*many)
    assert processor_s() - began < 2


def test_a_few_lines_that_stand_for_a_huge_value_build_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    said = problem("--config", write(tmp_path, "\n".join([*lines, "lora_r: *a11"])))
    assert "lora_r is not a value or a list of names" in said


@pytest.mark.parametrize(
    "text",
    [
        "bits: 4\nlora_r: !!python/object/apply:os.mkdir [canary]\n",
        "bits: 4\nlora_r: !!python/object/apply:os.mkdir {args: [canary]}\n",
        "bits: 4\nlora_r: !!python/name:os.mkdir\n",
        "bits: 4\nlora_r: [!!python/tuple [1, 2]]\n",
        "bits: 4\n? !!python/name:os.mkdir\n: 1\n",
        "#\n--- !!python/object/apply:os.mkdir [canary]\n",
        "#\n--- !!python/object:os.Thing\nbits: 4\n",
        "bits: 4\nlora_r: !own 4\n",
    ],
)
def test_a_tag_makes_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeInputError) as caught:
        read_config(path, GROUPS)
    assert f"{path}:2: the tag " in caught.value.problem
    assert not (tmp_path / "canary").exists()


def test_a_path_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "nothing.yaml", "/dev/zero"):
        assert "--config " in problem("--config", str(tmp_path / name))


@pytest.mark.parametrize("command", COMMANDS)
def test_debug_prints_a_traceback_before_the_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--config", "missing.yaml"]
    for argv, traced in ((missing, False), ([*missing, "--debug"], True)):
        assert main([command, *argv]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert ("Traceback" in printed.err) is traced
        assert printed.err.splitlines()[-1].startswith("error: --config missing.yaml: ")


def test_help_lists_every_command_and_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name.replace('_', '-')} " in listed
    with pytest.raises(SystemExit) as left:
        main(["finetune", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("cosine, linear or constant", "4, 8 or 16", "off by --no_double_quant"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("plan --model llama-7b", 4, "the hub cannot be reached"),
        ("plan --model ./nowhere", 3, "./nowhere: no such directory"),
        ("finetune --report_to wandbb", 2, "report_to: no tracker wandbb here"),
        ("finetune --report_to aim,nosuch", 2, "install its package"),
        ("finetune --output_dir loop", 2, "--output_dir loop is a loop of links"),
        ("finetune --output_dir loop/x", 2, "--output_dir loop/x is a loop of links"),
    ],
)
def test_what_needs_no_model_is_refused_without_torch(
    tmp_path: Path, arguments: str, code: int, words: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    program = (
        "import sys; sys.modules['torch'] = None; from qlora_kit.commands.main import main; "
        f"sys.exit(main({arguments.split()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr.splitlines()[-1]
