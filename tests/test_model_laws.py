"""Families that are found out from the model that is built: no step of theirs is silently wrong.

Logits, loss and adapter gradients are transformers' own on the weights that a model multiplies by,
with recompute and with padding. Of the families with a whole record this is in tests of their own;
all types in all bits are in benchmarks/models.py.
"""

from __future__ import annotations

import model_laws as laws
import pytest
import torch
from any_model import random_model, save_random

from qlora_kit.base.architecture import ARCHITECTURES
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.load import load_base
from qlora_kit.base.recurrence import read_directly
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.errors import ConfigError
from qlora_kit.lora.targets import target_candidates
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.prepare import prepare_model

FOUND_OUT = (
    "bloom",  # ALiBi, one projection of queries, keys and values, norms with bias
    "codegen",  # rotated by pairs, attention and MLP side by side
    "ctrl",  # sines for positions, linears called 0 and 2
    "gpt_bigcode",  # one head of keys and values
    "gpt_neox",  # other names in files
    "lfm3",  # short convolutions, other names in files
    "nemotron",  # squared ReLU
    "opt",  # learned positions with an offset
)
BEHIND_THE_HEAD = tuple(
    kind
    for kind, record in ARCHITECTURES.items()
    if not record.known and (record.logit_divisor or record.logit_factor or record.logit_softcap)
)
"""With a record of what comes behind the head alone."""
CASES = [
    *((kind, 4) for kind in (*FOUND_OUT, *BEHIND_THE_HEAD)),
    ("bloom", 16),
    ("opt", 8),
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


def test_packs_are_isolated(tmp_path):
    save_random(tmp_path, "gpt_bigcode")
    model = laws.adapted(tmp_path, 16)
    packed = laws.results_of(model, [collate_packs([laws.rows()], 0)])
    assert laws.worst(packed, laws.alone(model))[0] <= laws.TOLERANCE
    prepare_model(model, TrainingConfig(), "none", packing=True)


def test_packs_that_would_leak_are_refused(tmp_path):
    """BLOOM's ALiBi counts distances across the rows of a pack."""
    save_random(tmp_path, "bloom")
    model = laws.adapted(tmp_path, 16)
    with pytest.raises(ConfigError, match="keep apart"):
        prepare_model(model, TrainingConfig(), "none", packing=True)


def test_what_the_code_reads_past_a_layer_stays_as_it_is(tmp_path):
    """Mamba reads the weights of three linears itself; of BLOOM no step comes to such a line."""
    save_random(tmp_path, "falcon_mamba")
    model = load_base(str(tmp_path), bits=4, dtype="fp32", device="cpu").model
    read = {name.rpartition(".")[2] for name in read_directly(model)}
    assert read - {"lm_head"} == {"dt_proj", "x_proj", "out_proj"}
    layer = model.backbone.layers[0].mixer
    assert not isinstance(layer.dt_proj, QuantizedLinear)
    assert isinstance(layer.in_proj, QuantizedLinear)
    assert not any(name.endswith("dt_proj") for name in target_candidates(model))
    assert not read_directly(random_model("bloom"))
