"""In a GGUF every module has a place, and rows that turned together still do."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from qlora_kit.errors import ModelError
from qlora_kit.gguf.layout import Layout

WRITTEN = (
    *("llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4_mini"),
    *("granite", "smollm3"),
)


@pytest.mark.parametrize("family", WRITTEN)
def test_every_tensor_has_a_place_of_its_own(family: str) -> None:
    model = tiny_model(family)
    layout = Layout.of(model.config)
    modules = [name.rpartition(".") for name, _ in model.named_parameters()]
    names = [f"{layout.name(module)}.{leaf}" for module, _, leaf in modules]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"} <= set(names)


def test_neighbours_turn_as_the_halves_did() -> None:
    """A rotation of rows (i, i + d/2), and one of rows (2i, 2i + 1) in the file's order."""
    layout = Layout.of(tiny_model("llama2", num_key_value_heads=2).config)
    heads, width = 2, 16
    weight, x = torch.randn(heads * width, 64).double(), torch.randn(64).double()
    angle = torch.rand(width // 2).double()
    cos, sin = angle.cos(), angle.sin()

    def halves(rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.reshape(heads, 2, width // 2).unbind(1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1).flatten()

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.reshape(heads, width // 2, 2).unbind(2)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.stack(turned, 2).flatten()

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        return layout.rows("model.layers.0.self_attn.k_proj", tensor)

    ours, reference = neighbours(ordered(weight) @ x), ordered(halves(weight @ x))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    # What makes the rows is ordered alike: bias, and the B of an update B A.
    b, a = torch.randn(heads * width, 4).double(), torch.randn(4, 64).double()
    torch.testing.assert_close(ordered(b) @ a, ordered(b @ a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_rows_are_only_moved_where_llama_cpp_turns_neighbours(family: str) -> None:
    model = tiny_model(family)
    layout = Layout.of(model.config)
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            same = torch.equal(layout.rows(name, module.weight), module.weight)
            assert same == (family == "qwen2" or name.split(".")[-1] not in ("q_proj", "k_proj"))


@pytest.mark.parametrize("family", ["olmo2", "glm4", "gemma4", "helium"])
def test_other_families_are_refused_by_name(family: str) -> None:
    config = tiny_model(family).config
    with pytest.raises(ModelError, match=rf"'{config.model_type}' is not written as GGUF, only ge"):
        Layout.of(config)


def test_a_module_without_a_place_is_refused() -> None:
    layout = Layout.of(tiny_model("llama2").config)
    with pytest.raises(ModelError, match="no such part in llama models"):
        layout.name("model.layers.0.self_attn.gate_proj")
