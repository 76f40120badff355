"""Laws of `qlora-kit plan`: one JSON object, or a table with the same numbers."""

from __future__ import annotations

import json

import torch
from families import SIZES, VOCABULARY, save_checkpoint, save_tokenizer

from qlora_kit.commands.plan import main
from qlora_kit.commands.terminal import size

OPTIONS = ["--model", "tiny", "--device", "cpu", "--max_length", "64", "--lora_r", "8"]


def test_json_says_what_the_table_shows(capsys):
    assert main([*OPTIONS, "--device_memory", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["suggestions"] == []
    assert found["gradient_checkpointing"] == "none"
    assert found["bytes"]["weights"] > found["bytes"]["adapters"] > 0
    assert found["host_peak_bytes"] > 0
    assert main([*OPTIONS, "--device_memory", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert size(found["peak_bytes"]) in shown
    assert f"peak in {found['peak']['phase']}" in shown


def test_what_does_not_fit_comes_with_changes(capsys, tmp_path):
    # A context of 128 tokens: the table goes up to it.
    save_checkpoint(tmp_path / "base", "llama2", torch.bfloat16, num_hidden_layers=1)
    options = ["--model", str(tmp_path / "base"), *OPTIONS[2:], "--bits", "16", "--batch_size", "8"]
    assert main([*options, "--gradient_checkpointing", "full", "--json"]) == 0
    peak = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert main([*options, "--device_memory", str(peak - 1), "--grid", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["suggestions"]
    assert all(one["peak_bytes"] < peak for one in found["suggestions"])
    grid = found["grid"]
    assert {cell["fits"] for cell in grid} == {True, False}
    assert main([*options, "--device_memory", str(peak - 1), "--grid"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("! ") == 1 + sum(not cell["fits"] for cell in grid)
    assert f"! does not fit {size(peak - 1)}" in shown


def test_the_config_of_a_run_is_planned_as_it_stands(capsys, tmp_path):
    """What only a run asks is left alone there; a key that nobody knows is not."""
    config = tmp_path / "config.yaml"
    given = "model: tiny\ndevice: cpu\nmax_length: 64\nlora_r: 8\n"
    config.write_text(given + "data: rows.jsonl\noutput_dir: out\npacking: false\n")
    assert main(["--config", str(config), "--json"]) == 0
    found = capsys.readouterr().out
    assert main([*OPTIONS, "--json"]) == 0
    expected = capsys.readouterr().out
    plans = [json.loads(one) for one in (found, expected)]
    for plan in plans:
        del plan["budget_bytes"]  # what is free just now
    assert plans[0] == plans[1]
    config.write_text(given + "dta: rows.jsonl\n")
    assert main(["--config", str(config)]) == 2
    assert f"{config}:5: unknown key dta, did you mean data?" in capsys.readouterr().err


def test_what_a_run_refuses_is_not_planned(capsys, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: tiny\ndevice: cpu\nsave_steps: banana\neval_fraction: 7\n")
    cases = {
        ("--config", str(config)): ("save_steps", "banana", "eval_fraction", "7"),
        (*OPTIONS[:4], "--max_length", "100000"): ("100000", "context of 1024"),
        (*OPTIONS, "--adapter", "runs/some"): ("runs/some", "--target_modules"),
    }
    for options, words in cases.items():
        assert main(options) == 2, options
        line = capsys.readouterr().err
        assert all(word in line for word in words), line


def test_rows_that_are_added_are_planned(capsys, tmp_path):
    save_checkpoint(tmp_path / "base", "llama2", torch.bfloat16)
    save_tokenizer(tmp_path / "base", extra=50)
    options = ["--model", str(tmp_path / "base"), "--device", "cpu", "--bits", "16", "--json"]
    options += ["--dtype", "bf16"]
    sizes = []
    for more in ([], ["--resize_embeddings"]):
        assert main([*options, *more]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["bytes"]["weights_other"])
    added = 4 + 256 + 50 - VOCABULARY
    # A row of the embedding and one of the head, in bf16.
    assert sizes[1] - sizes[0] == added * 2 * SIZES["hidden_size"] * 2


def test_pairs_are_planned_as_pairs(capsys):
    """Each is of two rows; in a table, too, a batch has so many pairs."""
    options = [*OPTIONS, "--method", "dpo", "--device_memory", "1GiB"]
    assert main([*options, "--batch_size", "2", "--grid"]) == 0
    shown = capsys.readouterr().out
    assert "2 pairs of 2 x 64 tokens, 16 times a step" in shown
    assert "1 pair " in shown
    assert "8 pairs" in shown
    assert "batch 2" not in shown
    assert main([*OPTIONS, "--device_memory", "1GiB"]) == 0
    assert "1 x 64 tokens, 16 times a step" in capsys.readouterr().out


def test_longest_rows_are_shown_with_what_has_an_effect(capsys, tmp_path):
    """What was asked to lie on the host and stays on the device is not said to be there."""
    save_checkpoint(tmp_path / "base", "qwen2", torch.bfloat16, num_hidden_layers=1)
    options = ["--model", str(tmp_path / "base"), *OPTIONS[4:], "--device", "cuda"]
    options += ["--offload_embedding", "--no_offload_base", "--no_offload_activations"]
    options += ["--device_memory", "2GiB", "--longest"]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["longest"]
    assert not found["placement"]["embedding_on_host"]
    assert not any(one["placement"]["embedding_on_host"] for one in found["longest"])
    assert main(options) == 0
    table = capsys.readouterr().out.partition("longest rows that fit")[2]
    assert "all on the device" in table
    assert "embedding" not in table


def test_weights_that_are_not_quantized_are_not_called_embeddings(capsys):
    for bits, name in ((16, "weights, not quantized"), (4, "embeddings, head, norms")):
        assert main([*OPTIONS, "--bits", str(bits), "--json"]) == 0
        other = json.loads(capsys.readouterr().out)["bytes"]["weights_other"]
        assert main([*OPTIONS, "--bits", str(bits)]) == 0
        row = next(one for one in capsys.readouterr().out.splitlines() if size(other) in one)
        assert row.split("│")[0].strip() == name
