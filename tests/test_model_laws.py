"""Every family with a record, and unlike ones without: no step is silently wrong.

Logits, loss and adapter gradients are transformers' own on the weights that a model multiplies by,
with recompute and with padding. All types in all bits: benchmarks/models.py.
"""

from __future__ import annotations

import model_laws as laws
import pytest
import torch
from any_model import MODEL_TYPES, save_random

from qlora_kit.base.architecture import ARCHITECTURES
from qlora_kit.data.batch import collate
from qlora_kit.training.layer_forward import set_recompute

WITHOUT_RECORD = (
    "bloom",  # ALiBi, one projection of queries, keys and values, norms with bias
    "codegen",  # rotated by pairs, attention and MLP side by side
    "ctrl",  # sines for positions, linears called 0 and 2
    "falcon_mamba",  # no attention
    "gpt_bigcode",  # one head of keys and values
    "gpt_neox",  # other names in files
    "lfm3",
    "minicpm3",  # attention of low rank, factors everywhere
    "nemotron",  # squared ReLU
    "opt",  # learned positions with an offset
    "recurrent_gemma",  # a recurrence beside attention in windows
    "xlstm",
)
BUDGET = {16: ("qwen2", "bloom"), 8: ("granite", "opt")}
"""Of the other bits these; 4 has every type."""
CASES = [
    *((kind, 4) for kind in sorted({*ARCHITECTURES, *WITHOUT_RECORD} & set(MODEL_TYPES))),
    *((kind, bits) for bits, kinds in BUDGET.items() for kind in kinds),
]


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_a_step_is_the_one_of_transformers(kind, bits, tmp_path):
    save_random(tmp_path, kind)
    model, _ = laws.prepared(tmp_path, bits)
    found = laws.alone(model)
    error, tensor, _, rounding = laws.gradient_error(model, found, tmp_path)
    assert error <= max(laws.TOLERANCE, 2 * rounding), tensor
    # Padded on the right and recomputed: the same step.
    set_recompute(model, "full")
    padded, name = laws.worst(laws.results_of(model, [collate(laws.rows(), 0)]), found)
    assert padded <= laws.TOLERANCE, name


def test_the_laws_see_a_wrong_factor(tmp_path):
    """What they guard against: a factor on the logits that a loss does not know of."""
    save_random(tmp_path, "llama")
    model, _ = laws.prepared(tmp_path, 16)
    found = laws.alone(model)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.7
    assert laws.worst(laws.alone(model), found)[0] > 100 * laws.TOLERANCE
