"""Laws of the model card: what it says, what it keeps to itself."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_kit.run.metrics import versions, write_json, write_text
from qlora_kit.run.model_card import model_card


def a_run(**changes):
    config = {
        "model": "/home/someone/models/my base",
        "bits": 4,
        "quant_type": "nf4",
        "double_quant": True,
        "dtype": "bf16",
        "data": "/home/someone/secret/rows.jsonl",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "seed": 42,
        **changes.pop("config", {}),
    }
    parts = {
        "model": {
            "name": "/home/someone/models/my base",
            "revision": None,
            "fingerprint": "ab" * 32,
            "parameters": 260_032,
            "trainable_parameters": 4_096,
            "weight_bytes": 200_000,
        },
        "data": {
            "rows": 950,
            "skipped": 3,
            "tokens": 81_234,
            "supervised_tokens": 12_345,
            "unused": {},
        },
        "train": {
            "steps": 59,
            "seconds": 61.5,
            "tokens": 81_234,
            "tokens_per_s": 1320.9,
            "first_loss": 7.27,
            "last_loss": 2.16,
        },
        "eval": {"loss_before": 7.3, "loss_after": 2.2, "tokens": 678},
        "memory": {"device": "cpu", "planned": {"peak": 3 * 2**29}, "measured": {"peak": 2**30}},
    }
    return {"config": config, "versions": versions(), **(parts | changes)}


def front_matter(card):
    head = re.match(r"---\n(.*?\n)---\n", card, flags=re.DOTALL)
    assert head is not None
    return yaml.safe_load(head[1])


def test_a_data_name_that_is_no_utf_8_is_written(tmp_path):
    undecodable = os.fsdecode(b"rows-\xff.jsonl")
    write_text(tmp_path / "README.md", model_card(a_run(config={"data": undecodable})))
    assert "rows-\\udcff.jsonl" in (tmp_path / "README.md").read_text("utf-8")


def test_the_card_says_what_was_trained_on_what(tmp_path):
    card = model_card(a_run())
    assert front_matter(card) == {
        "base_model": "my base",
        "library_name": "peft",
        "tags": ["lora", "qlora"],
    }
    for part in (
        *("`rows.jsonl`, 950 rows", "81,234 tokens", "12,345 of them supervised"),
        *("4 bits, nf4, double quantization", "r 16, alpha 32.0", "`q_proj, v_proj`"),
        *("59 steps", "0.0002", "seed 42", "7.3000 before, 2.2000 after", "1321 tokens/s"),
        *("1.00 GiB measured, 1.50 GiB planned", "generate --adapter ADAPTER"),
    ):
        assert part in card
    assert "someone" not in card
    assert "None" not in card


def test_the_card_of_chats_says_how_to_ask_in_one_and_no_memory_is_nothing():
    run = a_run(memory={"device": "cpu", "measured": {"peak": 3 * 2**20}})
    assert "3.00 MiB measured, not planned" in model_card(run)
    assert "--adapter ADAPTER --prompt TEXT" in model_card(run)
    assert "--adapter ADAPTER --chat --prompt TEXT" in model_card(run, is_chat=True)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("tiny", "tiny"),
        ("./models/base", "base"),
        ("~/models/base/", "base"),
        ("/a/b/yes: no", "yes: no"),
        ("here/base", "base"),
    ],
)
def test_a_path_is_shown_by_its_last_part_and_a_hub_id_whole(tmp_path, monkeypatch, name, shown):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    run = a_run()
    run["model"]["name"] = name
    assert front_matter(model_card(run))["base_model"] == shown


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_cards_python_is_python(bits):
    run = a_run(config={"bits": bits})
    [code] = re.findall(r"```python\n(.*?)```", model_card(run), flags=re.DOTALL)
    ast.parse(code)
    assert (f"load_in_{bits}bit=True" in code) == (bits != 16)


def test_the_cards_python_skips_what_was_skipped():
    run = a_run(config={"skip_modules": ["down_proj", "layers.1.mlp"]})
    card = model_card(run)
    assert "double quantization, but for `down_proj, layers.1.mlp`" in card
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    [call] = [
        n
        for n in ast.walk(ast.parse(code))
        if getattr(n, "keywords", None) and "llm_int8" in ast.unparse(n)
    ]
    [listed] = [
        ast.literal_eval(k.value) for k in call.keywords if k.arg == "llm_int8_skip_modules"
    ]
    quantized = [
        name
        for name in (
            "model.layers.0.mlp.down_proj",
            "model.layers.1.mlp.up_proj",
            "lm_head",
            "model.layers.11.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
        )
        if should_convert_module(name, listed)
    ]
    assert quantized == ["model.layers.11.mlp.up_proj", "model.layers.0.mlp.up_proj"]


def test_a_base_of_8_bit_floats_is_not_quantized_in_the_cards_python():
    run = a_run()
    run["model"]["source_dtype"] = "bf16+float8_e4m3fn"
    assert "quantization = None" in model_card(run)


def test_the_card_of_a_run_read_back_without_an_evaluation_or_finite_losses(tmp_path):
    run = a_run(eval=None)
    run["train"]["last_loss"] = float("nan")
    del run["memory"]["planned"]
    write_json(tmp_path / "run.json", run)
    card = model_card(json.loads((tmp_path / "run.json").read_text()))
    assert card == model_card(run)
    assert "held-out" not in card
    assert "not finite at the last" in card
    assert "1.00 GiB measured, not planned" in card
