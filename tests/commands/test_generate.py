"""Laws of `qlora-kit generate`: the text that is streamed is the text of the model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tree_hash
from safetensors.torch import load_file, save_file
from trained import save_peft, trained_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.options.yaml_file import dump
from qlora_kit.run.saved_adapter import SavedAdapter

Run = Callable[..., Any]


def is_answered(answer: Any) -> bool:
    """Whether the command ended well, and says how fast it was and nothing else."""
    speed = (
        r"[\d,]+ tokens in \d+\.\d\d s: [\d,.]+ new tokens/s, with the time of prompts of "
        r"[\d,]+ tokens\n"
    )
    return answer.code == 0 and re.fullmatch(speed, answer.err) is not None


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The likeliest continuation by full forwards without a cache, as text."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if (
        tokenizer.bos_token_id is not None
        and ids[0, 0] != tokenizer.bos_token_id
        and (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    ):
        ids = torch.cat((torch.tensor([[tokenizer.bos_token_id]]), ids), 1)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat((ids, token), 1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_the_base_goes_on_as_plain_transformers_does(run: Run, workshop: Any) -> None:
    answer = run(
        "generate", "--model", workshop.base, "--bits", 16, "--dtype", "fp32", "--prompt", "Once",
        "--max_new_tokens", 20,
    )  # fmt: skip
    assert is_answered(answer)
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(workshop.base)
    assert answer.out == greedy(model, tokenizer, "Once", 20) + "\n"


def test_an_adapter_changes_what_is_said(run: Run, workshop: Any) -> None:
    flags = ("--model", workshop.base, "--prompt", "Once", "--max_new_tokens", 20)
    answer = run("generate", "--adapter", workshop.adapter, *flags)
    assert is_answered(answer)
    model = trained_base(workshop.base, bits=4, dtype="fp32").model
    tokenizer = AutoTokenizer.from_pretrained(workshop.base)
    assert answer.out == greedy(model, tokenizer, "Once", 20) + "\n"
    without = run("generate", *flags, "--bits", 4, "--dtype", "fp32")
    assert without.out != answer.out


def test_drawing_depends_on_the_seed_alone(run: Run, workshop: Any) -> None:
    flags = (
        "generate", "--model", workshop.base, "--bits", 16, "--prompt", "a", "--temperature", 1,
        "--top_p", 0.9, "--max_new_tokens", 30,
    )  # fmt: skip
    texts = [run(*flags, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_adapter_names_its_base(
    run: Run, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    config = RunConfig(base=BaseConfig(model=str(workshop.base), dtype="fp32"))
    (tmp_path / "adapter" / "config.yaml").write_text(dump(config.as_flat()))
    flags = ("--prompt", "Once", "--max_new_tokens", 8)
    named = run("generate", "--adapter", workshop.adapter, "--model", workshop.base, *flags)
    assert run("generate", "--adapter", tmp_path / "adapter", *flags).out == named.out
    # PEFT's config has the whole path, so that it is found from any folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter" / "config.yaml").unlink()
    assert run("generate", "--adapter", "adapter", *flags).out == named.out


@pytest.mark.parametrize("name", ["base", "llama-7b", "/nowhere/base", "./base", "/etc/hosts"])
def test_a_base_that_is_not_where_its_adapter_says_is_never_looked_up_on_the_hub(
    run: Run, workshop: Any, tmp_path: Path, name: str
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    answer = run("generate", "--adapter", tmp_path / "adapter", "--prompt", "Once")
    assert answer.code == 3
    assert f"belongs to the base {name}, which is not here; give its directory" in answer.line


def test_an_adapter_of_peft_says_its_base_and_not_its_bits(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    model = save_peft(workshop.base, tmp_path / "adapter", r=4, target_modules=["v_proj"])
    answer = run(
        "generate", "--adapter", tmp_path / "adapter", "--bits", 16, "--dtype", "fp32", "--prompt",
        "Once", "--max_new_tokens", 12,
    )  # fmt: skip
    assert is_answered(answer)
    tokenizer = AutoTokenizer.from_pretrained(workshop.base)
    assert answer.out == greedy(model.eval(), tokenizer, "Once", 12) + "\n"


def test_a_prompt_in_a_template_needs_one(run: Run, workshop: Any) -> None:
    answer = run("generate", "--model", workshop.base, "--prompt", "hi", "--chat")
    assert answer.code == 3
    assert "no chat template" in answer.line


def test_what_cannot_be_generated_is_refused(run: Run, workshop: Any, tmp_path: Path) -> None:
    before = tree_hash(workshop.base.parent)
    cases: list[tuple[list[object], int, str]] = [
        (["--model", workshop.base], 2, "no prompt is given; give --prompt TEXT or"),
        (["--model", workshop.base, "--prompt", "x", "--max_new_tokens", 500], 2, "context of 128"),
        (["--model", tmp_path / "no", "--prompt", "x"], 3, "no: no such directory"),
        (["--adapter", tmp_path / "no", "--prompt", "x"], 3, "no: no such directory"),
        (["--adapter", f"x={workshop.base}", "--prompt", "x"], 3, "holds no adapter_config.json"),
    ]
    for flags, code, words in cases:
        answer = run("generate", *flags)
        assert answer.code == code
        assert words in answer.line
        assert answer.out == ""
    assert tree_hash(workshop.base.parent) == before


def test_an_adapter_that_was_made_with_impossible_options_is_named(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    adapter = shutil.copytree(workshop.adapter, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    said = {**read_adapter(adapter).trained_on, "name": str(workshop.base), "bits": 7}
    save_file(load_file(weights), weights, {"qlora_kit": json.dumps(said)})
    before = tree_hash(tmp_path)
    answer = run("generate", "--adapter", adapter, "--prompt", "x")
    assert answer.code == 3
    assert f"{adapter}: says of its base: bits must be 4, 8 or 16, got 7" in answer.line
    assert tree_hash(tmp_path) == before


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Make a pipe that holds `content` the standard input, as a shell does."""
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    monkeypatch.setattr("sys.stdin", os.fdopen(read))


def test_a_prompt_comes_from_standard_input(
    run: Run, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("generate", "--model", workshop.base, "--bits", 16, "--max_new_tokens", 6)
    expected = run(*flags, "--prompt", "Once\nupon").out
    for more, content in (
        ((), b"Once\nupon\n"),
        (("--prompt", "-"), b"Once\nupon"),
        ((), b"Once\nupon\r\n"),
    ):
        piped(monkeypatch, content)
        assert run(*flags, *more).out == expected
    for content, code, words in (
        (b"\n", 2, "standard input holds no prompt"),
        (b"\xff", 3, "standard input: byte 0xff"),
    ):
        piped(monkeypatch, content)
        answer = run(*flags)
        assert (answer.code, answer.out) == (code, "")
        assert words in answer.line


def test_the_prompts_of_a_file_are_answered_as_each_alone(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    prompts = ["Once", "a much longer prompt than it", "no \n line", "Once"]
    flags = (
        "generate", "--adapter", workshop.adapter, "--model", workshop.base, "--max_new_tokens", 9,
        "--temperature", 1, "--top_k", 20, "--top_p", 0.9, "--repetition_penalty", 1.3,
        "--stop", "e", "--stop", "an", "--seed", 4,
    )  # fmt: skip
    alone = [run(*flags, "--prompt", prompt).out.removesuffix("\n") for prompt in prompts]
    assert len(set(alone)) == 3
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": n, "prompt": p}) + "\n" for n, p in enumerate(prompts))
    )
    (tmp_path / "rows.txt").write_text("\n\n".join(prompts[:2]) + "\r\n")
    for size in (1, 3, 8):
        answer = run(*flags, "--prompts", tmp_path / "rows.jsonl", "--batch_size", size)
        assert is_answered(answer)
        assert [json.loads(line) for line in answer.out.splitlines()] == [
            {"id": n, "prompt": p, "answer": a}
            for n, (p, a) in enumerate(zip(prompts, alone, strict=True))
        ]
    answer = run(*flags, "--prompts", tmp_path / "rows.txt")
    assert [json.loads(line)["answer"] for line in answer.out.splitlines()] == alone[:2]


def test_an_answer_ends_before_a_stop_string(
    run: Run, workshop: Any, recwarn: pytest.WarningsRecorder
) -> None:
    flags = ("generate", "--model", workshop.base, "--bits", 16, "--prompt", "Once")
    flags = (*flags, "--max_new_tokens", 30)
    whole = run(*flags).out.removesuffix("\n")
    assert len(whole) > 12
    for stops in ((whole[4:6],), (whole[9:12], whole[5]), (whole[0],), ("never there",)):
        end = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
        more = [flag for stop in stops for flag in ("--stop", stop)]
        recwarn.clear()
        assert run(*flags, *more).out == whole[:end] + "\n"
        said = [str(one.message) for one in recwarn]
        assert any("the answer is empty" in one for one in said) == (not whole[:end].strip())


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 3, 'rows.jsonl:2: has no "prompt"'),
        ("rows.jsonl", '{"prompt": 3}\n', 3, "rows.jsonl:1"),
        ("rows.jsonl", '{"prompt": "a", "adapter": "x"}\n', 3, 'rows.jsonl:1: "adapter" is x, and'),
        ("rows.jsonl", "", 3, "rows.jsonl:1: the file is empty"),
        ("rows.txt", "\n \n", 3, "rows.txt:1: the file is empty"),
        ("rows.yaml", "a", 2, "none of .jsonl"),
        ("gone.jsonl", None, 3, "gone.jsonl: no such file"),
    ],
)
def test_a_file_without_prompts_is_refused(
    run: Run, workshop: Any, tmp_path: Path, name: str, content: str | None, code: int, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    answer = run("generate", "--model", workshop.base, "--prompts", tmp_path / name)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.line


def test_prompts_of_two_places_are_refused(run: Run, workshop: Any) -> None:
    answer = run("generate", "--model", workshop.base, "--prompt", "x", "--prompts", workshop.rows)
    assert answer.code == 2
    assert "prompt is given beside prompts" in answer.line
    answer = run("generate", "--model", workshop.base, "--prompt", "x", "--stop", "")
    assert "stop must be texts that are not empty" in answer.line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: abc", "config.yaml: seed must be a whole number"),
        ("eval_fraction: 7", "config.yaml: eval_fraction must be at least 0"),
        ("data: ~nosuch/x", "config.yaml: data must be a path"),
        ("seed: !!timestamp abc", "config.yaml: seed must be a whole number"),
        ("seed: [", "config.yaml:2: not YAML"),
        ("lr: 1", "config.yaml:1: unknown key lr, did you mean learning_rate?"),
    ],
)
def test_what_no_run_writes_into_an_adapters_config_is_the_adapters_fault(
    run: Callable[..., Any], workshop: Any, tmp_path: Path, line: str, words: str
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "config.yaml").write_text(line + "\n")
    commands = [("evaluate", "--no_exact_match")]
    if "seed" not in words:  # which is nothing that generate takes from a run
        commands.append(("generate", "--prompt", "a"))
    for command in commands:
        answer = run(*command, "--adapter", tmp_path / "adapter")
        assert answer.code == 3, answer.err
        assert words in answer.line


@pytest.mark.parametrize("base", ["~nosuch/m", "./loop", "./loop/x", "a\0b", "x" * 5000])
def test_a_base_that_an_adapter_names_and_no_path_leads_to(
    run: Callable[..., Any], workshop: Any, tmp_path: Path, monkeypatch: Any, base: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    shutil.copytree(workshop.adapter, "adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    answer = run("generate", "--prompt", "a", "--adapter", "adapter")
    assert answer.code == 3, answer.err
    assert answer.line.startswith("error: adapter")


@pytest.mark.parametrize("literal", [True, False])
def test_a_prompt_is_read_as_the_run_of_the_adapter_read_its_rows(workshop, tmp_path, literal):
    adapter = tmp_path / "adapter"
    shutil.copytree(workshop.adapter, adapter)
    (adapter / "config.yaml").write_text(f"literal_control_tokens: {str(literal).lower()}\n")
    assert SavedAdapter.open(str(adapter)).reads_literally() is literal
