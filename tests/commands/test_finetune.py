"""Laws of the finetune command: what it writes, what it refuses, and that it refuses early."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import save_checkpoint
from peft import AutoPeftModelForCausalLM
from processor import processor_s
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.commands import generate
from qlora_kit.commands.display import shell_word
from qlora_kit.commands.finetune import QUICKSTART, main
from qlora_kit.errors import ConfigError
from qlora_kit.files.atomic import check_output

SETTINGS = "--bits 16 --dtype fp32 --lora_r 4 --batch_size 2 --gradient_accumulation_steps 2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments that name a tiny base and rows with and without a prompt that fits."""
    place = tmp_path_factory.mktemp("finetune")
    save_checkpoint(place / "base")
    draw = random.Random(1)

    def rows(count):
        for _ in range(count):
            words = [f"w{draw.randint(3, 90)}" for _ in range(draw.randint(3, 9))]
            yield {"prompt": " ".join(words), "completion": " ".join(reversed(words))}

    (place / "data").mkdir()
    for name, count in (("train", 10), ("valid", 4)):
        lines = [json.dumps(row) for row in rows(count)]
        (place / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--model", str(place / "base"), "--data", str(place / "data"), *SETTINGS.split()]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The directory of a run of two epochs."""
    output = tmp_path_factory.mktemp("runs") / "run"
    mask = os.umask(0o027)
    try:
        assert main([*inputs, "--num_train_epochs", "2", "--output_dir", str(output)]) == 0
    finally:
        os.umask(mask)
    return output


def error_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_finished_run_has_the_files_of_the_contract(finished):
    assert {path.name for path in finished.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "README.md",
    }
    for path in finished.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_run_json_says_what_the_run_was(finished):
    run = json.loads((finished / "run.json").read_text())
    assert list(run) == ["config", "versions", "model", "data", "train", "eval", "memory"]
    assert run["config"]["lora_r"] == 4
    assert run["model"]["name"] == "base"
    # 4 linears: 2 layers of q (64 -> 64) and v (64 -> 64, without grouping), rank 4.
    assert run["model"]["trainable_parameters"] == 4 * 4 * (64 + 64)
    assert len(run["model"]["fingerprint"]) == 64
    assert run["data"]["rows"] == 10
    assert run["train"]["steps"] == 6  # 3 windows of 4, 4 and 2 rows, twice
    assert run["train"]["tokens"] == 2 * run["data"]["tokens"]
    assert run["train"]["tokens_per_s"] == pytest.approx(
        run["train"]["tokens"] / run["train"]["seconds"]
    )
    assert run["eval"]["loss_before"] != run["eval"]["loss_after"]
    measured = run["memory"]["measured"]
    assert measured["weights"] == measured["weights_quantized"] + measured["weights_other"]
    assert measured["adapters"] == measured["gradients"] == 4 * run["model"]["trainable_parameters"]
    assert 0 < measured["optimizer"] < measured["peak"]


def test_metrics_have_a_line_a_step(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    run = json.loads((finished / "run.json").read_text())
    fields = "step loss learning_rate grad_norm tokens supervised_tokens seconds peak_bytes"
    assert all(set(line) == set(fields.split()) for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] == run["train"]["first_loss"]
    assert lines[-1]["loss"] == run["train"]["last_loss"]
    assert sum(line["tokens"] for line in lines) == run["train"]["tokens"]
    supervised = sum(line["supervised_tokens"] for line in lines)
    assert supervised == 2 * run["data"]["supervised_tokens"]


def test_config_yaml_is_resolved_and_the_card_names_the_base(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["dtype"], config["device"], config["optim"]) == ("fp32", "cpu", "adamw")
    assert config["adapter_dtype"] == "fp32"
    assert config["max_length"] == 128  # the base's context, which is below 1024
    assert "quant_type" not in config  # does not apply at 16 bits
    assert "`base`" in (finished / "README.md").read_text()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 7]])).logits


def test_peft_and_transformers_find_the_base_of_an_adapter_and_the_cards_lines_run(
    inputs, finished, tmp_path, monkeypatch
):
    """From another folder and without a network, on a base that lies in a directory."""
    monkeypatch.chdir(tmp_path)
    said = json.loads((finished / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == inputs[1]
    card = (finished / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    done: dict[str, Any] = {}
    exec(code.replace("ADAPTER", str(finished)), done)
    plain = AutoModelForCausalLM.from_pretrained(inputs[1], dtype=torch.float32)
    expected = logits_of(done["model"])
    assert done["tokenizer"]("count 1")["input_ids"]
    assert not torch.equal(expected, logits_of(plain))
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(str(finished), dtype=torch.float32)
        width = min(expected.shape[-1], loaded.get_output_embeddings().out_features)
        found = logits_of(loaded)[..., :width]
        torch.testing.assert_close(found, expected[..., :width], rtol=1e-5, atol=1e-5)


def test_a_base_in_a_folder_is_the_same_base_from_every_folder(inputs, tmp_path, monkeypatch):
    """`models/base` is a path where `models` is, and somebody's hub id where it is not."""
    place = tmp_path / "place"
    shutil.copytree(inputs[1], place / "models" / "base")
    monkeypatch.chdir(place)
    rest = [*inputs[2:], "--max_steps", "1", "--eval_fraction", "0", "--token_cache", "none"]
    shutil.copytree(rest[1], place / "data" / "mine")
    rest[1] = "data/mine"
    assert main(["--model", "models/base", *rest, "--output_dir", "out"]) == 0
    config = yaml.safe_load((place / "out" / "config.yaml").read_text())
    assert config["model"] == str(place / "models" / "base")
    assert config["data"] == str(place / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    for missing in ("none", "config.yaml"):
        (place / "out" / missing).unlink(missing_ok=True)
        arguments = ["--adapter", str(place / "out"), "--prompt", "a", "--max_new_tokens", "1"]
        assert generate.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--target_modules", "nope_proj"], 2, ["nope_proj", "q_proj (2)", "down_proj (2)"]),
        (["--target_modules", "q_proj,nope"], 2, ["nope", "q_proj (2)"]),
        (["--lora_r", "200"], 2, ["lora_r 200", "above the largest dimension"]),
        (["--max_length", "129"], 2, ["129", "128", "--allow_longer_context"]),
        (["--eval_steps", "1", "--eval_fraction", "0"], 2, ["eval_steps 1", "nothing is held out"]),
        (["--load_best"], 2, ["load_best", "eval_steps"]),
        (["--early_stopping", "2"], 2, ["early_stopping 2", "eval_steps"]),
        (["--override", "seed"], 2, ["override", "resume_from_checkpoint"]),
        (["--overwrite", "--resume_from_checkpoint", "auto"], 2, ["overwrite", "name one"]),
        (["--resume_from_checkpoint", "/nowhere/checkpoint-1"], 3, ["/nowhere/checkpoint-1"]),
        (["--save_total_limit", "0"], 2, ["save_total_limit", "at least 1"]),
        (["--save_steps", "-1"], 2, ["save_steps", "at least 0"]),
        (["--device", "cuda:9"], 4, ["cuda:9"]),
        (["--report_to", "surely_not"], 2, ["surely_not"]),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_is_read(
    inputs, tmp_path, capsys, monkeypatch, arguments, code, said
):
    if "--eval_fraction" in arguments:
        data = inputs[inputs.index("--data") + 1] + "/train.jsonl"
        arguments = [*arguments, "--data", data]
    if "--report_to" not in arguments:
        # Weights are only read through this name.
        monkeypatch.setattr("qlora_kit.run.assembly.read_weights", lambda base: 1 / 0)
    output = tmp_path / "run"
    assert main([*inputs, *arguments, "--output_dir", str(output)]) == code
    error = error_of(capsys)
    assert error.startswith("error: ")
    assert len(error) <= 400
    for part in said:
        assert part in error, (part, error)
    assert not output.exists()


def test_a_directory_that_is_not_empty_is_refused_and_overwrite_replaces_it(
    inputs, tmp_path, capsys
):
    output = tmp_path / "run"
    output.mkdir()
    (output / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    assert main([*inputs, "--max_steps", "1", "--output_dir", str(output)]) == 2
    assert "is not empty; choose another place, or give --overwrite" in error_of(capsys)
    assert main([*inputs, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]) == 2
    assert "is not empty" in error_of(capsys)
    (output / "mine.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert main([*inputs, "--max_steps", "1", "--output_dir", str(output), *more]) == 2
        error = error_of(capsys)
        assert ("or give --overwrite" in error, "holds mine.txt" in error) == (False, bool(more))
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "mine.txt"]
    (output / "mine.txt").unlink()
    assert main([*inputs, "--max_steps", "1", "--output_dir", str(output), "--overwrite"]) == 0
    assert not (output / "export.json").exists()
    assert (output / "run.json").exists()


def test_a_directory_inside_the_model_is_refused(inputs, capsys):
    base = inputs[1]
    before = sorted(os.listdir(base))
    for place in (base, f"{base}/inside"):
        assert main([*inputs, "--output_dir", place, "--overwrite"]) == 2
        assert "overlaps" in error_of(capsys)
    assert sorted(os.listdir(base)) == before


def test_links_to_the_directory_are_kept(inputs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    command = [*inputs, "--max_steps", "2", "--save_steps", "1", "--output_dir"]
    assert main([*command, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "checkpoint-2").is_dir()
    assert (tmp_path / "real" / "run.json").exists()


def test_few_steps_are_said_with_the_value_that_gives_fifty(inputs, tmp_path, capsys):
    assert main([*inputs, "--output_dir", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    asked = r"in only 3 optimizer steps .*: --num_train_epochs (\d+) or --max_steps 50 takes 50"
    found = re.search(asked, said)
    assert found, said
    steps_per_epoch = 3  # of 10 rows in steps of 4
    assert steps_per_epoch * int(found[1]) >= 50 > steps_per_epoch * 16
    assert main([*inputs, "--max_steps", "20", "--output_dir", str(tmp_path / "b")]) == 0
    assert "only" not in capsys.readouterr().out


def test_prompts_are_answered_before_and_after_within_the_context(inputs, tmp_path, capsys):
    """A held-out prompt that fills the context leaves no room for an answer, and is passed over."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        text = (Path(inputs[inputs.index("--data") + 1]) / f"{name}.jsonl").read_text()
        long = json.dumps({"prompt": " ".join(["w5"] * 120), "completion": "w6"}) + "\n"
        (data / f"{name}.jsonl").write_text(long + text if name == "valid" else text)
    arguments = ["--data", str(data), "--sample_prompts", "2", "--max_steps", "1"]
    assert main([*inputs, *arguments, "--output_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "held-out prompt 2" in said
    assert "held-out prompt 3" not in said
    assert "w5 w5 w5 w5" not in said
    assert re.search(r"right answers: \d of 2 before, \d of 2 after", said)


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


def test_without_fused_blocks_a_run_has_the_same_losses_and_takes_more(inputs, tmp_path, capsys):
    """The first is equal bit for bit; the others differ by sums in another order."""
    settings = ["--bits", "4", "--max_steps", "4", "--gradient_checkpointing", "none"]
    runs = []
    for flag in ("--fused_blocks", "--no_fused_blocks"):
        output = tmp_path / flag
        assert main([*inputs, *settings, flag, "--output_dir", str(output)]) == 0
        assert "stays as it is" not in capsys.readouterr().out
        record = json.loads((output / "run.json").read_text())
        runs.append((losses_of(output), record["memory"]))
    (ours, memory), (theirs, other_memory) = runs
    assert ours[0] == theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-5)
    for of in ("planned", "measured"):
        assert memory[of]["peak"] < other_memory[of]["peak"]


def test_a_base_whose_layers_are_not_ours_keeps_its_own_and_that_is_said(inputs, tmp_path, capsys):
    save_checkpoint(tmp_path / "base", hidden_act="relu")
    command = ["--model", str(tmp_path / "base"), *inputs[2:], "--max_steps", "2"]
    note = "note: LlamaDecoderLayer stays as it is: its parts are not those of a known block"
    runs = []
    for flag, said in (("--own_blocks", 1), ("--no_own_blocks", 0)):
        output = tmp_path / flag
        assert main([*command, flag, "--output_dir", str(output)]) == 0
        assert " ".join(capsys.readouterr().out.split()).count(note) == said
        runs.append(losses_of(output))
    assert runs[0] == runs[1]


@pytest.mark.skipif(not QUICKSTART.exists(), reason="no quickstart.yaml yet")
def test_without_a_flag_the_quickstart_is_shown_and_run(tmp_path, capsys, monkeypatch):
    """Its file is an ordinary config; a flag beats it."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--max_steps", "2", "--batch_size", "1", "--gradient_accumulation_steps", "1"]
    began = processor_s()
    assert main(arguments) == 0
    assert processor_s() - began < 90
    said = capsys.readouterr().out
    for line in QUICKSTART.read_text().splitlines():
        assert line in said
    assert "held-out prompt 3" in said
    assert "memory of the base" in said
    (run,) = (tmp_path / "runs").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"], config["bits"], config["max_steps"]) == ("tiny", 4, 2)


def test_a_run_that_is_named_as_a_checkpoint_is_answered_with_what_goes_on_with_it(
    tmp_path, capsys, monkeypatch
):
    """It was taken for a folder of the quickstart's: '--output_dir . is not empty'."""
    monkeypatch.chdir(tmp_path)
    Path("w/checkpoint-1").mkdir(parents=True)
    Path("w/checkpoint-1/state.json").write_text('{"config": {"model": "tiny", "data": "mine"}}')
    for named in ("w", "w/checkpoint-1"):
        newest = f"--output_dir w --resume_from_checkpoint {'auto' if named == 'w' else named}"
        assert main(["--resume_from_checkpoint", named]) == 2
        error = error_of(capsys)
        assert f"--resume_from_checkpoint {named} is " in error
        assert error.endswith(f"go on with the flags that it was started with, and {newest}")
    Path("w/config.yaml").write_text("model: tiny")
    assert main(["--resume_from_checkpoint", "w"]) == 2
    newest = "--output_dir w --resume_from_checkpoint auto"
    assert error_of(capsys).endswith(f"; go on with --config w/config.yaml {newest}")
    assert main(["--model", "tiny", "--resume_from_checkpoint", "w"]) == 2
    assert f"w is a run, and no checkpoint; {newest} goes on from its" in error_of(capsys)


def test_the_default_name_has_the_bits_that_the_base_is_quantized_in(inputs, tmp_path, monkeypatch):
    """Without --bits a checkpoint of 8 bits is held in 8."""
    source = AutoModelForCausalLM.from_pretrained(
        inputs[1], quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float16
    )
    source.save_pretrained(tmp_path / "stored")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(inputs[1]) / name, tmp_path / "stored")
    monkeypatch.chdir(tmp_path)
    more = [
        "--dtype",
        "fp32",
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
    ]
    assert main(["--model", "./stored", *inputs[2:4], *more]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["stored-data-8bit"]


@pytest.mark.parametrize(
    "text", ["plain", "two words", "it's\n", "a\\b\n\tc", "$HOME `x`\n", "\x1b[2J", ""]
)
def test_a_prompt_is_one_word_of_a_shell(text: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s. {shell_word(text)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{text}."


def test_a_finished_run_may_be_replaced_and_with_a_file_of_ones_own_may_not(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    check_output(run, overwrite=True)
    (run / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which no run and no export made"):
        check_output(run, overwrite=True)
