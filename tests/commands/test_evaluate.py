"""Laws of `qlora-kit evaluate`: its figures are computed apart, of base, adapter and export."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tree_hash
from trained import trained_base, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.yaml_file import dump

Run = Callable[..., Any]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_apart(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Minus the mean log-probability of completion and end, row by row in double."""
    total, count = 0.0, 0
    start = (
        [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    )
    for row in rows:
        prompt = start + tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        log_p = logits.double().log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            total -= float(log_p[place - 1, token])
            count += 1
    return total / count, count


def evaluated(run: Run, *flags: object) -> dict[str, Any]:
    answer = run("evaluate", "--json", *flags)
    assert (answer.code, answer.err) == (0, "")
    return dict(json.loads(answer.out))


def test_the_loss_of_base_adapter_and_export(run: Run, workshop: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workshop.base)
    rows = rows_of(workshop.rows)
    flags = ("--data", workshop.rows, "--max_new_tokens", 4)
    base = evaluated(run, "--model", workshop.base, "--bits", 16, "--dtype", "fp32", *flags)
    plain = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    loss, tokens = loss_apart(plain, tokenizer, rows)
    assert base["loss"] == pytest.approx(loss, rel=1e-5)  # fp32 against double
    assert base["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert (base["tokens"], base["rows"], base["skipped"]) == (tokens, len(rows), 0)
    assert (base["model"], base["bits"], base["adapter"]) == ("base", 16, None)

    adapted = evaluated(run, "--adapter", workshop.adapter, "--model", workshop.base, *flags)
    loss, _ = loss_apart(trained_base(workshop.base, bits=4, dtype="fp32").model, tokenizer, rows)
    assert adapted["loss"] == pytest.approx(loss, rel=1e-5)
    assert (adapted["bits"], adapted["dtype"], adapted["adapter"]) == (4, "fp32", "adapter")
    assert adapted["loss"] != pytest.approx(base["loss"], rel=1e-3)

    done = run(
        "export", "--adapter", workshop.adapter, "--model", workshop.base, "--output_dir",
        tmp_path / "out", "--verify", workshop.rows,
    )  # fmt: skip
    assert done.code == 0
    export = evaluated(run, "--model", tmp_path / "out", "--bits", 16, "--dtype", "fp32", *flags)
    assert export["loss"] == pytest.approx(adapted["loss"], rel=1e-5)
    # Four bits once more are another model, which is said unless they are asked for.
    asked = ("evaluate", "--model", tmp_path / "out", "--no_exact_match", *flags)
    with pytest.warns(UserWarning, match="out is a model that export wrote, and is quantized to 4"):
        assert run(*asked).code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(*asked, "--bits", 4).code == 0


def test_answers_are_right_where_they_equal_the_completion(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    # The model's own greedy texts are made the completions of every second row.
    rows = rows_of(workshop.rows)
    flags = ("--model", workshop.base, "--bits", 16, "--dtype", "fp32", "--max_new_tokens", 6)
    first = evaluated(run, *flags, "--data", workshop.rows, "--generate", len(rows))
    assert [one["prompt"] for one in first["answers"]] == [row["prompt"] for row in rows]
    assert [one["expected"] for one in first["answers"]] == [
        row["completion"].strip() for row in rows
    ]
    assert (first["right"], first["exact_match"], first["asked"]) == (0, 0.0, len(rows))
    known = 0
    for row, said in list(zip(rows, first["answers"], strict=True))[::2]:
        if said["answer"]:
            row["completion"] = f" {said['answer']}\n"
            known += 1
    assert known >= 4
    (tmp_path / "known.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    second = evaluated(run, *flags, "--data", tmp_path / "known.jsonl", "--generate", 3)
    assert (second["right"], second["asked"]) == (known, len(rows))
    assert second["exact_match"] == known / len(rows)
    assert len(second["answers"]) == 3
    assert second["answers"][0]["right"] is bool(first["answers"][0]["answer"])
    # Neither the batch nor the rows beside it change an answer.
    one_by_one = evaluated(
        run, *flags, "--data", tmp_path / "known.jsonl", "--generate", 3, "--batch_size", 1
    )
    assert one_by_one["answers"] == second["answers"]
    text = run("evaluate", *flags, "--data", tmp_path / "known.jsonl", "--generate", 1)
    assert f"{known} of {len(rows)} answers equal the completion" in text.out
    assert f"loss       {second['loss']:.4f} nats a token" in text.out


def test_without_exact_match_nothing_is_generated(run: Run, workshop: Any) -> None:
    report = evaluated(run, "--model", workshop.base, "--data", workshop.rows, "--no_exact_match")
    assert (report["exact_match"], report["asked"], report["answers"]) == (None, None, [])
    answer = run("evaluate", "--no_exact_match", "--generate", 2)
    assert answer.code == 2
    assert "generate 2 shows answers, and exact_match is off" in answer.line


def test_rows_of_text_have_a_loss_and_no_answers(run: Run, workshop: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n{"text": "d e f g"}\n')
    flags = ("--model", workshop.base, "--data", tmp_path / "rows.jsonl")
    report = evaluated(run, *flags)
    assert (report["rows"], report["exact_match"]) == (2, None)
    answer = run("evaluate", *flags, "--generate", 1)
    assert answer.code == 2
    assert "generate 1: rows.jsonl has rows of text, which have no completion" in answer.line


def test_a_prompt_that_fills_the_context_counts_as_wrong(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    rows = [*rows_of(workshop.rows)[:3], {"prompt": "x" * 200, "completion": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    report = evaluated(
        run, "--model", workshop.base, "--data", tmp_path / "rows.jsonl", "--generate", 4
    )
    assert (report["rows"], report["skipped"], report["asked"]) == (3, 1, 4)
    assert report["answers"][3]["answer"] == ""


def test_a_file_is_evaluated_whole_and_a_directory_where_it_is_held_out(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", 20)
    write_rows(tmp_path / "valid.jsonl", 7)
    flags = ("--model", workshop.base, "--no_exact_match")

    def rows(*more: object) -> tuple[int, str]:
        report = evaluated(run, *flags, *more)
        return report["rows"], report["data"]

    assert rows("--data", tmp_path / "train.jsonl") == (20, "train.jsonl")
    assert rows("--data", tmp_path) == (7, "valid.jsonl")
    assert rows("--data", tmp_path / "train.jsonl", "--eval_data", tmp_path / "valid.jsonl") == (
        7,
        "valid.jsonl",
    )
    share = rows("--data", tmp_path / "train.jsonl", "--eval_fraction", 0.25, "--seed", 9)
    assert share == (5, "25 % of train.jsonl, drawn by seed 9")


def test_an_adapter_is_evaluated_on_what_its_run_held_out(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    write_rows(tmp_path / "rows.jsonl", 40)
    config = RunConfig(
        base=BaseConfig(model=str(workshop.base), dtype="fp32"),
        data=DataConfig(data=str(tmp_path / "rows.jsonl"), eval_fraction=0.2, train_on_prompt=True),
        training=TrainingConfig(seed=5),
    )
    (tmp_path / "adapter" / "config.yaml").write_text(dump(config.as_flat()))
    flags = ("--adapter", tmp_path / "adapter", "--no_exact_match")
    report = evaluated(run, *flags)
    assert (report["rows"], report["data"]) == (8, "20 % of rows.jsonl, drawn by seed 5")
    fewer = evaluated(run, *flags, "--no_train_on_prompt")
    assert fewer["tokens"] < report["tokens"]
    assert evaluated(run, *flags, "--data", tmp_path / "rows.jsonl")["rows"] == 40


def test_other_rows_become_text_as_those_of_the_run_did(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    rows = [{"instruction": "Say it.", "output": answer} for answer in ("one", "two</s>three")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = RunConfig(
        base=BaseConfig(model=str(workshop.base), dtype="fp32"),
        data=DataConfig(data="gone.jsonl", instruction_as_chat=True),
    )
    (tmp_path / "adapter" / "config.yaml").write_text(dump(config.as_flat()))
    flags = ("--adapter", tmp_path / "adapter", "--no_exact_match", "--chat_template", "plain")
    flags = (*flags, "--data", tmp_path / "rows.jsonl")
    as_trained = evaluated(run, *flags)
    assert as_trained == evaluated(run, *flags, "--instruction_as_chat")
    other = evaluated(run, *flags, "--no_instruction_as_chat")
    assert other["loss"] != pytest.approx(as_trained["loss"], rel=1e-3)


def test_rows_that_are_cut_are_counted(run: Run, workshop: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * length, "completion": "y" * 8} for length in (2, 14)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = ("--model", workshop.base, "--data", tmp_path / "rows.jsonl", "--no_exact_match")
    assert evaluated(run, *flags)["truncated"] == 0
    flags = (*flags, "--max_length", 20)
    assert evaluated(run, *flags)["truncated"] == 1
    assert "rows.jsonl: 2 rows, 1 truncated, " in run("evaluate", *flags).out
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "rows.jsonl: 1 row, " in run("evaluate", *flags).out


@pytest.mark.parametrize(("count", "fraction"), [(4, None), (40, 0.0)])
def test_where_a_run_held_nothing_out_rows_are_asked_for(
    run: Run, workshop: Any, tmp_path: Path, count: int, fraction: float | None
) -> None:
    """A loss of rows that were trained on, or of the package's sample, is not that of the run."""
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    write_rows(tmp_path / "rows.jsonl", count)
    config = RunConfig(
        base=BaseConfig(model=str(workshop.base), dtype="fp32"),
        data=DataConfig(data=str(tmp_path / "rows.jsonl"), eval_fraction=fraction),
    )
    (tmp_path / "adapter" / "config.yaml").write_text(dump(config.as_flat()))
    flags = ("--adapter", tmp_path / "adapter", "--no_exact_match")
    answer = run("evaluate", *flags)
    said = "no rows of rows.jsonl, on which adapter adapter was trained, are held out; give rows"
    assert (answer.code, said in answer.line) == (2, True), answer.line
    # All of them where that is asked for, and what an earlier version held out of four.
    for share, rows in ((0, count), (0.05, max(1, count // 20))):
        assert evaluated(run, *flags, "--eval_fraction", share)["rows"] == rows
    assert evaluated(run, *flags, "--data", tmp_path / "rows.jsonl")["rows"] == count


def test_what_cannot_be_evaluated_is_refused(run: Run, workshop: Any, tmp_path: Path) -> None:
    before = tree_hash(workshop.base.parent)
    cases: list[tuple[list[object], int, str]] = [
        (["--data", tmp_path / "no.jsonl"], 3, "no.jsonl: no such file"),
        (["--data", workshop.rows, "--max_length", 129], 2, "above the model's context of 128"),
        (["--data", workshop.rows, "--adapter", tmp_path / "no"], 3, "no such directory"),
        (["--data", workshop.rows, "--lora_r", 4], 2, "unknown flag --lora_r"),
    ]
    for flags, code, words in cases:
        answer = run("evaluate", "--model", workshop.base, *flags)
        assert answer.code == code
        assert words in answer.line
    assert tree_hash(workshop.base.parent) == before
