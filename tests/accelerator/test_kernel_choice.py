"""Attention takes the kernel that the card has, and nothing of the size of all pairs of tokens."""

from __future__ import annotations

import pytest
from accelerator import accelerator, saved

from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.target import Capability
from qlora_kit.training.loop import train_step

T = 1024
KERNELS = ("flash", "efficient")


def rows(*lengths: int) -> list[Encoded]:
    return [Encoded([5] * length, [-100, *[5] * (length - 1)]) for length in lengths]


@pytest.mark.parametrize(
    ("family", "dtype", "card", "kernel", "recompute", "packed"),
    [
        ("llama3", "bf16", (8, 6), "flash", "none", False),
        ("llama3", "fp16", (9, 0), "flash", "selective", True),
        ("llama3", "fp16", (7, 5), "efficient", "none", True),
        ("llama3", "fp32", (8, 6), "efficient", "full", False),
        ("mistral", "bf16", (8, 6), "flash", "selective", True),
        ("mistral", "fp16", (7, 5), "efficient", "full", False),
        ("gemma2", "bf16", (8, 6), None, "none", True),
    ],
)
def test_attention_is_the_kernel_of_the_card(
    family: str, dtype: str, card: Capability, kernel: str | None, recompute: str, packed: bool
) -> None:
    both = rows(600, T - 600)
    real = collate_packs([both], 0) if packed else collate(rows(T), 0)
    with accelerator(card) as here:
        directory = saved(family, max_position_embeddings=T)
        model = here.adapted(directory, bits=16, dtype=dtype, recompute=recompute, targets="auto")
        optimizer, given = here.optimizer(model), here.on_host(real)
        with here.watch() as seen:
            train_step(model, [given], optimizer, step=1, max_grad_norm=1.0)
    assert not {(name, shape) for name, shape in seen.results if shape[-2:] == (T, T)}
    attention = " ".join(one for one in seen.operations if "atten" in one)
    assert [one for one in KERNELS if one in attention] == ([kernel] if kernel else [])
