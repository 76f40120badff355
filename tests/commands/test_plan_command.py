"""Laws of `qlora-kit plan`: one JSON object, or a table with the same numbers."""

from __future__ import annotations

import json

from qlora_kit.commands.display import size
from qlora_kit.commands.plan import main

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


def test_what_does_not_fit_comes_with_changes(capsys):
    options = [*OPTIONS, "--bits", "16", "--batch_size", "8"]
    assert main([*options, "--gradient_checkpointing", "full", "--json"]) == 0
    peak = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert main([*options, "--device_memory", str(peak - 1), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["suggestions"]
    assert all(one["peak_bytes"] < peak for one in found["suggestions"])


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
