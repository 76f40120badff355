"""Eight adapters of different rank, targets and scaling on the tiny base, and what each answers."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch

from qlora_kit.base.load import load_base
from qlora_kit.commands.generate import main as generate
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.inject import inject_lora, lora_layers

ROOT = Path(__file__).resolve().parents[2]
RANKS = (1, 2, 4, 8, 8, 16, 32, 64)
BASE_OPTIONS = ("--model", "tiny", "--bits", "4", "--dtype", "fp32", "--device", "cpu")
"""In fp32 no rounding of a batch's matmuls decides between two tokens."""
NEW_TOKENS = 48
SPREAD = 0.9
"""Standard deviation of B times the root of its rank: large enough for texts of their own."""


def make_adapters(folder: Path) -> dict[str, Path]:
    """Save the adapters below `folder`; their directories by name."""
    made = {}
    for number, rank in enumerate(RANKS):
        name = f"task{number}"
        targets = "all-linear" if number % 2 else "q_proj,v_proj"
        base = load_base("tiny", bits=4, dtype="fp32", device="cpu")
        inject_lora(base.model, LoRAConfig(r=rank, alpha=rank, target_modules=targets), seed=number)
        drawn = torch.Generator().manual_seed(number)
        for layer in lora_layers(base.model).values():
            weight = layer.lora_B["default"].weight
            weight.data.normal_(0, SPREAD / rank**0.5, generator=drawn)
        made[name] = folder / name
        save_adapter(base, made[name])
    return made


def prompts(count: int) -> list[str]:
    """Prompts of the package's sample: texts of different lengths."""
    path = ROOT / "qlora_kit" / "assets" / "samples" / "extract" / "valid.jsonl"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:count]]


def answers_of_generate(
    adapter: Path | None, asked: list[str], folder: Path, *, chat: bool
) -> list[str]:
    """What the command `generate` answers with this adapter alone, one prompt at a time."""
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    command = [*BASE_OPTIONS, "--prompts", str(rows), "--batch_size", "1"]
    command += ["--max_new_tokens", str(NEW_TOKENS)]
    command += ["--adapter", str(adapter)] if adapter else []
    command += ["--chat"] if chat else []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = generate(command)
    if code:
        raise RuntimeError(f"generate ended with {code}")
    return [json.loads(line)["answer"] for line in said.getvalue().splitlines()]
