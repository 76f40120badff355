"""The attention of a model's decoding steps, and of everybody else."""

from __future__ import annotations

import pytest
import torch
from families import relative_error, tiny_model, token_ids

from qlora_kit.generation import step_attention
from qlora_kit.generation.group import Group
from qlora_kit.generation.step_attention import attending_in_step


@pytest.mark.parametrize("family", ["llama2", "qwen3", "gemma4", "phi3"])
@torch.no_grad()
def test_a_step_s_logits_are_those_of_the_library(family, monkeypatch):
    """Rows of different lengths, windows, heads that share keys; a prompt is the library's."""
    model = tiny_model(family, torch.bfloat16)
    model.set_attn_implementation("sdpa")
    calls, real = [], step_attention.attend_one
    monkeypatch.setattr(step_attention, "attend_one", lambda *g: calls.append(1) or real(*g))

    def logits():
        prompts = [one[: 4 + 3 * row] for row, one in enumerate(token_ids(3, 16).tolist())]
        group = Group(model, prompts, 0)
        found = [group.logits()]
        assert not calls
        for token in (5, 6):
            group.feed(torch.full((3,), token))
            found.append(group.logits())
        return torch.stack(found)

    ours = logits()
    assert calls
    calls.clear()
    monkeypatch.setattr(step_attention, "is_step", lambda *given: False)
    theirs = logits()
    assert not calls
    assert torch.equal(ours[0], theirs[0])
    # Logits of two layers, whose attention the library rounds twice.
    assert relative_error(ours, theirs) < 4 * torch.finfo(torch.bfloat16).eps


def test_only_inside_a_step_of_this_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(step_attention, "is_step", lambda *given: bool(seen.append(1)))
    model = tiny_model("llama2")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(input_ids=token_ids(1, 4))
        assert not seen
        with attending_in_step():
            model(input_ids=token_ids(1, 4))
        assert seen
