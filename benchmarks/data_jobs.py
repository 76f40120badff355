"""What `data.py` measures, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

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
