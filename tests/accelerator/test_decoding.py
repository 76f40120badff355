"""A decoding step on a device: nothing read, nothing copied, no weight dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerator import accelerator
from families import save_checkpoint
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_kit.base.linear import Linear4bit
from qlora_kit.generation.decode import generate_ids
from qlora_kit.generation.engine import Engine
from qlora_kit.generation.group import Group
from qlora_kit.generation.request import Request
from qlora_kit.generation.sampling import Sampling
from qlora_kit.lora.inject import switch_of
from qlora_kit.lora.mixed import Mixed

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SETTINGS = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9]], [[4, 5]] * 8])
def test_after_the_prompt_a_step_waits_for_nothing_and_dequantizes_nothing(
    tmp_path: Path, prompts: list[list[int]]
) -> None:
    """Drawing, the penalty for tokens that were there included."""
    with accelerator() as card, torch.no_grad():
        with unset_fake_temporarily():
            save_checkpoint(tmp_path, **WIDE)
        model = card.adapted(tmp_path, bits=4).eval()
        weights = {m.weight.numel() * 2 for m in model.modules() if isinstance(m, Linear4bit)}
        group, draw = Group(model, prompts, 0), Sampling(**SETTINGS).drawer(prompts, 3)
        with card.watch() as first:
            group.feed(draw(group.logits()))
        with card.watch() as seen:
            group.feed(draw(group.logits()))
            draw(group.logits())
    assert first.reads == seen.reads == seen.copied_in == seen.copied_out == []
    made = {torch.Size(shape).numel() for _, shape in seen.results}
    assert weights
    assert not made & weights
    assert seen.operations["bitsandbytes::gemm_4bit"] == 2 * 14
    assert first.operations["bitsandbytes::gemm_4bit"] == 0


def test_a_step_of_mixed_rows_waits_for_nothing_and_copies_nothing(tmp_path: Path) -> None:
    """What rows take of the matrices goes up once, when they are first computed."""
    with accelerator() as card, torch.no_grad():
        with unset_fake_temporarily():
            save_checkpoint(tmp_path, **WIDE)
        model = card.adapted(tmp_path, bits=4).eval()
        switch = switch_of(model)
        switch.active = Mixed.of([switch.active, None])
        assert isinstance(switch.active, Mixed)
        group = Group(model, [[5, 6, 7], [8, 9]], 0)
        with card.watch() as first:
            group.feed(group.logits().argmax(-1))
        with card.watch() as seen:
            group.feed(group.logits().argmax(-1))
    assert first.reads == seen.reads == seen.copied_in == seen.copied_out == []
    assert first.copied_in
    assert seen.operations["aten::masked_fill_"] == 14


def test_a_step_reads_once(tmp_path: Path) -> None:
    with accelerator() as card:
        with unset_fake_temporarily():
            save_checkpoint(tmp_path, **WIDE)
        model = card.adapted(tmp_path, bits=4).eval()
        prompts = [[5, 6, 7], [8, 9]]
        with card.watch(may_read=True) as seen:
            steps = generate_ids(model, prompts, max_new_tokens=4, eos_ids=[], pad_id=0, **SETTINGS)
            assert list(steps) == [[1, 1]] * 4
    assert seen.reads == [(2, 2)] * 4


def test_a_step_reads_once_while_rows_join_and_leave(tmp_path: Path) -> None:
    with accelerator() as card:
        with unset_fake_temporarily():
            save_checkpoint(tmp_path, **WIDE)
        engine = Engine(card.adapted(tmp_path, bits=4).eval(), pad_id=0)
        rows = []
        with card.watch(may_read=True) as seen:
            for step in range(9):
                if step in (0, 1, 4):
                    how = Sampling(**SETTINGS) if step else Sampling()
                    for length in (2, 5):
                        engine.add(Request([5] * length, 2 + step, sampling=how))
                told = engine.step()
                rows.append(sum(token is not None for _, token in told))
    assert rows == [2, 4, 2, 2, 2, 2, 2, 2, 2]
    assert seen.reads == [(2, count) for count in rows], seen.places
    assert seen.copied_out == []
