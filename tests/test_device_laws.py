"""The laws of `tests/cuda` on the CPU: their first run on a card is not their first run.

Left out is the way through the commands, which `tests/commands` go here.
"""

from __future__ import annotations

from pathlib import Path

import device_laws as laws
import pytest
import torch
from late_copies import Late

from qlora_kit.lora import dropout


@pytest.mark.parametrize(("family", "bits"), [("llama_bias", 4), ("mistral", 8), ("gemma2", 16)])
def test_a_step_is_that_of_the_cpu(family: str, bits: int) -> None:
    laws.check_step(family, bits, "cpu")


@pytest.mark.parametrize(("family", "bits"), [("qwen3", 4), ("phi3", 8)])
def test_a_step_in_16_bits_is_as_far_from_fp32(family: str, bits: int) -> None:
    laws.check_step_in_16_bits(family, bits, torch.bfloat16, "cpu")


@pytest.mark.parametrize("copies", [lambda: None, Late])
def test_a_step_replayed_from_the_host_is_that_of_the_cpu(copies) -> None:
    laws.check_replays_from_host("llama3", 4, "cpu", copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_tiles_is_one_without(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(dropout, "TILE_TOKENS", 16)
    laws.check_tiles("llama3", dtype, "cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_are_those_of_the_cpu(bases: Path, bits: int) -> None:
    laws.check_answers(bases / "llama3", bits, "cpu")


def test_an_export_is_read_back_as_there_is_room(bases: Path, tmp_path: Path) -> None:
    ways = laws.check_export(bases / "deep", tmp_path, 4, "cpu")
    assert ways == ["whole, on the host", *2 * ["layer by layer, on the host"]]


def test_a_step_takes_what_is_planned(bases: Path) -> None:
    laws.check_planned(bases / "deep", 4, "full", "cpu", within=0)


def test_the_laws_see_a_gradient_that_is_wrong() -> None:
    expected = laws.results_of(laws.trains("llama2", 4, torch.float32, "cpu"), laws.alone())
    name = next(iter(expected.keys() - {"loss"}))
    for wrong in (expected[name] * 1.001, torch.full_like(expected[name], float("nan"))):
        assert laws.worst(expected | {name: wrong}, expected) > (1e-4, "")
