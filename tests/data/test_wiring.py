"""The data flags through the command: what is packed, grouped, templated and kept trains right."""

import json

import pytest
import torch
from chat_tokenizer import chat_tokenizer
from families import save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.commands.evaluate import main as evaluate
from qlora_kit.commands.export import main as export
from qlora_kit.commands.finetune import main
from qlora_kit.commands.generate import main as generate
from qlora_kit.data.chat_template import use_template
from qlora_kit.generation.decode import answers

COMMON = ("--bits", "16", "--dtype", "fp32", "--device", "cpu", "--max_length", "96")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer of all control tokens, and chats of many lengths."""
    folder = tmp_path_factory.mktemp("wiring")
    tokenizer = chat_tokenizer()
    save_checkpoint(folder / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(12):
            messages = [
                {"role": "user", "content": "he " * (number % 5)},
                {"role": "assistant", "content": "hello " * (1 + number % 4) + str(number)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def train(place, *flags):
    arguments = ["--model", place / "model", "--data", place / "chats.jsonl"]
    arguments += ["--output_dir", place / "out", "--chat_template", "plain", *COMMON]
    arguments += ["--eval_fraction", "0", "--overwrite", *flags]
    assert main([str(argument) for argument in arguments]) == 0
    lines = (place / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_one_step_over_all_rows_is_the_same_padded_grouped_and_packed(place, capsys):
    # Through the command: loss and gradient of the same tokens, in fp32.
    whole = ["--max_steps", "1", "--gradient_accumulation_steps", "1"]
    (padded,) = train(place, *whole, "--batch_size", "12")
    (grouped,) = train(place, *whole, "--batch_size", "12", "--group_by_length")
    for level in ("none", "full"):
        options = ("--batch_size", "12", "--packing", "--gradient_checkpointing", level)
        (packed,) = train(place, *whole, *options)
        for other in (grouped, packed):
            assert other["tokens"] == padded["tokens"]
            assert other["supervised_tokens"] == padded["supervised_tokens"]
            assert other["loss"] == pytest.approx(padded["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-5)
    out = capsys.readouterr().out
    assert "12 rows in" in out
    assert "no pad token: padding with EOS" in out


def test_a_named_template_is_saved_with_the_adapter(place):
    train(place, "--max_steps", "1")
    saved = AutoTokenizer.from_pretrained(place / "out")
    named = chat_tokenizer()
    use_template(named, "plain")
    assert saved.chat_template == named.chat_template
    assert "chat_template: plain" in (place / "out" / "config.yaml").read_text()


def test_a_packed_run_ends_after_its_packs(place):
    packed = train(place, "--packing", "--batch_size", "1", "--gradient_accumulation_steps", "1")
    padded = train(place, "--batch_size", "1", "--gradient_accumulation_steps", "1")
    assert len(packed) < len(padded) == 12
    assert sum(step["tokens"] for step in packed) == sum(step["tokens"] for step in padded)


def test_the_saved_template_is_used_by_every_command(place, capsys):
    train(place, "--max_steps", "1")
    # What is printed for going on asks in the chat template too.
    assert f"--adapter {place / 'out'} --chat --prompt " in capsys.readouterr().out
    model, adapter = str(place / "model"), str(place / "out")
    common, short = ["--model", model, "--adapter", adapter], ["--max_new_tokens", "4"]
    assert generate(["--device", "cpu", *common, "--prompt", "he", "--chat", *short]) == 0
    options = ["--data", str(place / "chats.jsonl"), "--device", "cpu", "--json", *short]
    assert evaluate([*common, *options]) == 0
    assert export([*common, "--output_dir", str(place / "export"), "--device", "cpu"]) == 0
    saved = AutoTokenizer.from_pretrained(place / "export")
    named = chat_tokenizer()
    use_template(named, "plain")
    assert saved.chat_template == named.chat_template
    # Without the adapter the base has none, until one is named.
    assert evaluate(["--model", model, *options]) == 3
    assert "has no chat template" in capsys.readouterr().err
    assert evaluate(["--model", model, *options, "--chat_template", "plain"]) == 0


def test_the_last_turn_of_a_chat_is_asked_for_as_training_has_it(place, capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    use_template(tokenizer, "plain")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    rows, expected = [], []
    for number in range(6):
        messages = [
            {"role": "user", "content": "he " * number},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": f"and {number}"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[0] == tokenizer.bos_token_id
        (answer,) = answers(model, tokenizer, [ids], max_new_tokens=5)
        answer = answer.strip()
        # What the random model says need not be text that can be read again.
        content = answer if answer.isprintable() and "\ufffd" not in answer else "else"
        rows.append({"messages": [*messages, {"role": "assistant", "content": content}]})
        expected.append((content, answer, content == answer))
    known = sum(right for *_, right in expected)
    assert 0 < known < 6
    rows.append({"messages": [{"role": "user", "content": "nobody answers"}]})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", str(tmp_path / "chats.jsonl"), "--device", "cpu", "--json", *COMMON[:4]]
    options += ["--chat_template", "plain", "--max_new_tokens", "5", "--generate", "6"]
    assert evaluate(["--model", str(place / "model"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["right"], report["asked"], report["exact_match"]) == (known, 6, known / 6)
    found = [(one["expected"], one["answer"], one["right"]) for one in report["answers"]]
    assert found == expected
    assert "and 5" in report["answers"][5]["prompt"]
