"""A small Qwen3, trained from random weights on Shakespeare: a trained model of a second family.

No other trained model of a few million weights is at hand that is not a Llama. The recipe is that
of the package's own base (`examples/tiny`), shorter, and with its tokenizer.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

WINDOW, WINDOWS = 128, 16
PEAK_RATE, WARMUP_STEPS = 3e-3, 50


def pretrained(directory: Path, tokenizer_files: Path, text: Path, steps: int) -> dict[str, float]:
    """Write the model to `directory`; its held-out loss before and after, in nats a token.

    The last fiftieth of the text is held out.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False).input_ids)
    row, held_out = ids[: -len(ids) // 50], ids[-len(ids) // 50 :]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.08,  # about 1 / sqrt(hidden_size)
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    before = _held_out_loss(model, held_out)
    _train(model, row, steps)
    found = {"loss_before": before, "loss_after": _held_out_loss(model, held_out)}
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_files / name, directory / name)
    return {"parameters": model.num_parameters(), "tokens": steps * WINDOW * WINDOWS, **found}


def _train(model: Qwen3ForCausalLM, row: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    for step in range(steps):
        places = torch.randint(len(row) - WINDOW, (WINDOWS, 1), generator=generator)
        loss = _loss(model, row[places + torch.arange(WINDOW + 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"pretraining, step {step + 1}: loss {loss.item():.3f}", flush=True)


def _loss(model: Qwen3ForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token of windows (B, T + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def _held_out_loss(model: Qwen3ForCausalLM, row: Tensor) -> float:
    windows = row[: len(row) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    return float(sum(_loss(model, part) * len(part) for part in windows.split(32))) / len(windows)
