"""Reading and encoding against `datasets.map`, training padded, grouped and packed, and memory.

Encoding is measured in processes of their own, alternating, and the best of the rounds is taken:
other work on the machine only ever makes a round slower. Training takes the orders step about in
one process, so that other work falls on all of them. Needs QLORA_KIT_DATA and
the extra `data`. `--memory` also writes a file of 10 million lines and 5 GB to a temporary folder
(and 10 GB of tokens beside it at most), and takes that file through reading, encoding and the
order of an epoch.

    python benchmarks/data.py
    python benchmarks/data.py --only memory --lines 10000000 --bytes 5000000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import make_parser, write_result

COLUMNS = "question=prompt,answer=completion"
LENGTH = 1024
BATCH = 8
PACKS = 2
STEPS = 22


def tokenizer(data: Path) -> Any:
    """GPT-2's, from its two files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    files = (str(data / "tokenizers/gpt2" / name) for name in ("vocab.json", "merges.txt"))
    backend = Tokenizer(models.BPE.from_file(*files))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)


def encode_ours(path: Path, data: Path) -> dict[str, float]:
    """Read, encode, mask, count and keep a file's rows; rows a second."""
    from qlora_kit.config.data import DataConfig
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.rows import load_rows

    made = tokenizer(data)
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        began = time.perf_counter()
        config = DataConfig(data=str(path), columns=COLUMNS, eval_fraction=0)
        encoded = encode_rows(load_rows(config, 0).train, made, LENGTH, cache=Path(cache))
        seconds = time.perf_counter() - began
    rows = len(encoded.rows)
    return {"rows": rows, "tokens": encoded.tokens, "seconds": seconds}


def encode_datasets(path: Path, data: Path) -> dict[str, float]:
    """The same ids and labels with `datasets`: load, then a batched map that keeps both."""
    import datasets

    made = tokenizer(data)
    eos = made.eos_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = made(batch["question"], add_special_tokens=False)["input_ids"]
        answers = made(batch["answer"], add_special_tokens=False)["input_ids"]
        pairs = list(zip(prompts, answers, strict=True))
        return {
            "input_ids": [[*p, *a, eos] for p, a in pairs],
            "labels": [[-100] * len(p) + [*a, eos] for p, a in pairs],
        }

    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        seconds = time.perf_counter() - began
        tokens = sum(map(len, encoded.with_format("numpy")["input_ids"][:]))
    return {"rows": len(encoded), "tokens": tokens, "seconds": seconds}


def train(level: str, data: Path) -> dict[str, Any]:
    """Real tokens and seconds of training GSM8K on the 60M shape in each order, step about.

    LoRA on frozen bf16, as `finetune` trains. Two packs take as many places as a padded batch.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_kit.config.data import DataConfig
    from qlora_kit.config.lora import LoRAConfig
    from qlora_kit.config.training import TrainingConfig
    from qlora_kit.data.batch import lengths_of
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.order import make_packs
    from qlora_kit.data.rows import load_rows
    from qlora_kit.data.schedule import StepSchedule
    from qlora_kit.lora.inject import inject_lora
    from qlora_kit.training.loop import train as run
    from qlora_kit.training.prepare import prepare_model

    made = tokenizer(data)
    path = str(data / "text/gsm8k/train.jsonl")
    config = DataConfig(data=path, columns=COLUMNS, eval_fraction=0)
    encoded = encode_rows(load_rows(config, 0).train, made, LENGTH)
    shape = json.loads((data / "configs/llama_shape_60m.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(made), max_position_embeddings=LENGTH, **{n: shape[n] for n in names}
    )
    model = LlamaForCausalLM(llama).to(torch.bfloat16).requires_grad_(False)
    inject_lora(model, LoRAConfig(), seed=0)
    # Attends as the library does wherever a sequence holds one row.
    assert prepare_model(model, TrainingConfig(), level) is None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    packs = make_packs(lengths_of(encoded.rows), LENGTH, 0)
    schedule = StepSchedule(rows=encoded.rows, batch_size=BATCH, num_steps=STEPS, seed=0)
    orders = {
        "random": schedule,
        "grouped": replace(schedule, group_by_length=True),
        "packed": replace(schedule, batch_size=PACKS, packs=packs),
    }
    found = {order: {"tokens": 0, "seconds": 0.0, "slots": 0} for order in orders}
    for number, windows in enumerate(zip(*orders.values(), strict=True)):
        for order, window in zip(orders, windows, strict=True):
            (step,) = run(model, [window], optimizer)
            # The first steps compile and allocate.
            if number >= 2:
                found[order]["tokens"] += step.tokens
                found[order]["seconds"] += step.seconds
                found[order]["slots"] += sum(batch["input_ids"].numel() for batch in window)
    return found


def padding(data: Path) -> dict[str, float]:
    """The share of padding over a whole epoch, in each order."""
    from qlora_kit.config.commands import ShowConfig
    from qlora_kit.config.data import DataConfig
    from qlora_kit.data.report import report_of
    from qlora_kit.data.rows import load_rows

    path = str(data / "text/gsm8k/train.jsonl")
    config = DataConfig(data=path, columns=COLUMNS, eval_fraction=0, token_cache="none")
    options = ShowConfig(rows=0)
    rows = load_rows(config, options.seed)
    return report_of(rows, config, LENGTH, options, "gpt2", tokenizer(data)).padding


def memory(path: Path, _: Path) -> dict[str, float]:
    """How much the process grows from a small file to a large one: read, encode, pack, order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qlora_kit.config.data import DataConfig
    from qlora_kit.data.batch import lengths_of
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.order import make_packs
    from qlora_kit.data.rows import load_rows
    from qlora_kit.data.schedule import StepSchedule

    # A tokenizer of words: how many rows there are is what memory could depend on.
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    small = path.parent / "small.jsonl"
    with path.open() as file, small.open("w") as part:
        part.writelines(next(file) for _ in range(10_000))
    found: dict[str, float] = {}
    for name, source in (("small", small), ("large", path)):
        began = time.perf_counter()
        config = DataConfig(data=str(source), eval_fraction=0)
        with tempfile.TemporaryDirectory(dir=path.parent) as cache:
            encoded = encode_rows(load_rows(config, 0).train, made, LENGTH, cache=Path(cache))
            packs = make_packs(lengths_of(encoded.rows), LENGTH, 0)
            schedule = StepSchedule(rows=encoded.rows, batch_size=8, num_steps=20, seed=0)
            for _ in replace(schedule, packs=packs):
                pass
            for _ in schedule:
                pass
        found |= {
            f"{name}_rows": len(encoded.rows),
            f"{name}_peak_bytes": _peak_bytes(),
            f"{name}_seconds": time.perf_counter() - began,
        }
    found["growth_bytes"] = found["large_peak_bytes"] - found["small_peak_bytes"]
    return found


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


JOBS = {"ours": encode_ours, "datasets": encode_datasets, "memory": memory}


def in_process(job: str, argument: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--argument", argument]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The fastest of the rounds."""
    return min(rounds, key=lambda found: found["seconds"])


def compare_encoding(path: Path, rounds: int) -> dict[str, Any]:
    """Rows a second of both, alternating, and how much faster ours is."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "datasets": []}
    for _ in range(rounds):
        for job, measured in found.items():
            measured.append(in_process(job, str(path)))
            print(path.name, job, measured[-1], flush=True)
    result: dict[str, Any] = {job: best(measured) for job, measured in found.items()}
    assert result["ours"]["tokens"] == result["datasets"]["tokens"]
    for measured in result.values():
        measured["rows_per_s"] = measured["rows"] / measured["seconds"]
    result["ratio"] = result["ours"]["rows_per_s"] / result["datasets"]["rows_per_s"]
    return result


def compare_training() -> dict[str, Any]:
    """Real tokens a second in each order, and the ratios to random batches, by recompute level."""
    result: dict[str, Any] = {}
    for level in ("full", "none"):
        found: dict[str, Any] = in_process("train", level)
        for measured in found.values():
            measured["tokens_per_s"] = measured["tokens"] / measured["seconds"]
            measured["padding"] = 1 - measured["tokens"] / measured["slots"]
        for order in ("grouped", "packed"):
            ratio = found[order]["tokens_per_s"] / found["random"]["tokens_per_s"]
            found[f"{order}_over_random"] = ratio
        print(level, found, flush=True)
        result[level] = found
    return result


def write_rows(path: Path, source: Path, lines: int) -> None:
    """A file of that many rows: GSM8K's, each with a number that makes it another one."""
    rows = [json.loads(line) for line in source.open()]
    with path.open("w") as file:
        for number in range(lines):
            row = rows[number % len(rows)]
            # Short rows, as many data sets have them: what a row costs is what is measured.
            question = f"{number}: {row['question'][:80]}"
            file.write(json.dumps({"question": question, "answer": row["answer"][:80]}) + "\n")


def main() -> None:
    parser = make_parser(__doc__, "data")
    parser.add_argument("--only", choices=["encoding", "training", "memory"], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the generated file")
    parser.add_argument("--lines", type=int, default=10_000_000, help="of the memory file")
    parser.add_argument("--bytes", type=int, default=5_000_000_000, help="of the memory file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--argument", help=argparse.SUPPRESS)
    given = parser.parse_args()
    data = Path(os.environ["QLORA_KIT_DATA"])
    if given.job == "train":
        print(json.dumps(train(given.argument, data)))
        return
    if given.job:
        print(json.dumps(JOBS[given.job](Path(given.argument), data)))
        return
    gsm8k = data / "text/gsm8k/train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "encoding"):
            small, large = Path(folder) / "gsm8k.jsonl", Path(folder) / "generated.jsonl"
            small.write_bytes(gsm8k.read_bytes())
            write_rows(large, gsm8k, given.rows)
            result = {
                "gsm8k": compare_encoding(small, given.rounds),
                f"generated_{given.rows}": compare_encoding(large, max(1, given.rounds - 1)),
            }
            print(write_result(given, result, "encoding"))
            large.unlink()
        if given.only in (None, "training"):
            epoch = padding(data)
            result = {"padding_of_an_epoch": epoch, **compare_training()}
            print(write_result(given, result, "training"))
        if given.only in (None, "memory"):
            path = Path(folder) / "large.jsonl"
            line = json.dumps({"text": ""}) + "\n"
            words = (given.bytes // given.lines - len(line) - 10) // 10
            with path.open("w") as file:
                for number in range(given.lines):
                    text = f"{number:09d} " + "w" * 9 + " " + ("v" * 9 + " ") * (words - 1)
                    file.write(json.dumps({"text": text}) + "\n")
            size = path.stat().st_size
            result = {"lines": given.lines, "bytes": size, **in_process("memory", str(path))}
            print(result)
            print(write_result(given, result, "memory"))


if __name__ == "__main__":
    main()
