"""Laws of the verification: its figures are those of a plain computation over all logits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_model, token_ids
from trained import trained_base

from qlora_kit.data.batch import collate
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import NumericError, ResourceError
from qlora_kit.export import read_back
from qlora_kit.export.export import export_model
from qlora_kit.export.read_back import ways
from qlora_kit.export.readers import verify_export
from qlora_kit.export.verify import (
    TOKEN_LIMIT,
    Decoded,
    Verification,
    check_distance,
    compare,
    decoded,
)
from qlora_kit.kernels.workspace import own_workspace
from qlora_kit.memory.counter import StorageCounter


def moved(model: Any, spread: float = 0.03) -> Any:
    """A copy of a model whose weights are a little elsewhere."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += torch.randn_like(parameter) * spread
    return other


ROWS = [token_ids(1, length, seed=length)[0].tolist() for length in (2, 9, 17, 30)]
BATCHES = [
    collate([Encoded(ids, ids) for ids in ROWS[:3]], pad_id=0),
    collate([Encoded(ROWS[3], ROWS[3])], pad_id=0),
]


def verify(trained: Any, exported: Any, batches: Any) -> Verification:
    """Two models on the same batches."""
    return compare(Decoded(trained, batches), Decoded(exported, batches).pieces())


@pytest.mark.parametrize("family", ["llama2", "gemma2", "granite"])
def test_figures_equal_those_of_all_logits_in_double(family: str) -> None:
    ours = tiny_model(family)
    theirs = moved(ours)
    result = verify(ours, theirs, BATCHES)
    kl, agreed, largest, tokens = 0.0, 0, 0.0, 0
    with torch.no_grad():
        for ids in ROWS:
            # One row at a time and nothing padded; the last token predicts none of the row.
            p, q = (model(torch.tensor([ids])).logits[0, :-1].double() for model in (ours, theirs))
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            largest = max(largest, float((p - q).abs().max()))
            tokens += len(ids) - 1
    assert result.tokens == tokens == 54
    assert result.kl == pytest.approx(kl / tokens, rel=1e-4)  # fp32 against fp64
    assert result.top1_agreement == agreed / tokens
    assert result.max_logit_difference == pytest.approx(largest, rel=1e-4)
    assert 0 < result.top1_agreement < 1
    assert result.as_dict() == {
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "max_logit_difference": result.max_logit_difference,
        "tokens": 54,
    }


def test_a_model_is_no_distance_from_itself() -> None:
    model = tiny_model()
    result = verify(model, copy.deepcopy(model), BATCHES)
    assert (result.kl, result.top1_agreement, result.max_logit_difference) == (0, 1, 0)


def test_the_divergence_is_from_the_trained_model() -> None:
    ours = tiny_model()
    theirs = moved(ours, 0.05)
    there, back = verify(ours, theirs, BATCHES), verify(theirs, ours, BATCHES)
    assert there.kl != pytest.approx(back.kl, rel=1e-3)  # it is no distance both ways
    assert there.top1_agreement == back.top1_agreement


def test_dropout_of_a_model_in_training_does_not_count() -> None:
    ours = tiny_model(attention_dropout=0.5).train()
    assert verify(ours, copy.deepcopy(ours), BATCHES).kl == 0


def test_a_divergence_that_is_no_number_is_not_taken_for_none() -> None:
    ours = tiny_model()
    theirs = copy.deepcopy(ours)
    theirs.get_output_embeddings().weight.data[7, 0] = float("inf")
    result = verify(ours, theirs, BATCHES)
    assert math.isnan(result.kl)
    with pytest.raises(NumericError, match="which is no number"):
        check_distance(result.kl, None, "closer")


def test_an_export_is_read_whole_where_it_fits_else_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is asked is the size in the files, what a device has free, and that the host is spared.

    A 7 B in 16 bits took 17.9 GB on the host, where it had been loaded in 3.6.
    """
    save_checkpoint(tmp_path, "llama2", torch.bfloat16, num_hidden_layers=8)
    cpu, card = torch.device("cpu"), torch.device("cuda:1")
    size = (tmp_path / "model.safetensors").stat().st_size

    def found(device: torch.device, free: float) -> list[str]:
        return [str(way) for way in ways(tmp_path, device, int(free))]

    on_host = "layer by layer, on the host"
    assert found(cpu, 2 * size) == ["whole, on the host", on_host]
    assert found(cpu, size) == [on_host]
    assert found(card, 2 * size) == ["whole, on cuda:1", "layer by layer, on cuda:1", on_host]
    assert found(card, size) == ["layer by layer, on cuda:1", on_host]
    assert found(card, size / 8) == [on_host]
    monkeypatch.setattr(read_back, "ON_HOST", size)
    assert found(cpu, 100 * size) == [on_host]
    assert found(card, 2 * size) == ["whole, on cuda:1", "layer by layer, on cuda:1", on_host]


class Full(StorageCounter):
    """A device without room for more than `limit` bytes beside what it has."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def _add(self, tensor: Any, component: str) -> None:
        if not tensor.is_meta:
            super()._add(tensor, component)
        if self.current > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate some more")


def test_memory_that_ends_meanwhile_leads_to_layer_by_layer(tmp_path: Path) -> None:
    """Where it was thought to fit and does not; and where no way fits, a remedy of its own."""
    save_checkpoint(tmp_path / "base", "llama2", num_hidden_layers=8)
    base = trained_base(tmp_path / "base", bits=4, dtype="fp32", device="cpu")
    export_model(base, tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    rows = [Encoded(ids, ids) for ids in ROWS]
    expected, way = verify_export(base, tmp_path / "out", rows)
    assert way.whole
    assert expected.kl <= 1e-6  # both are fp32: only the order of sums differs
    # Whole it takes more than 1.2 of its file, layer by layer 0.8 at most. A workspace that other
    # tests have made larger would count as this one's.
    with own_workspace({}), Full(size * 6 // 5):
        found, way = verify_export(base, tmp_path / "out", rows)
    assert not way.whole
    assert found.kl <= 1e-6
    refused = pytest.raises(ResourceError, match="out of memory while")
    with own_workspace({}), Full(size // 16), refused as caught:
        verify_export(base, tmp_path / "out", rows)
    assert "layer by layer, on the host: CUDA out of memory" in caught.value.problem
    assert "--verify FILE with a few short rows" in caught.value.remedy


def test_reading_ends_once_enough_tokens_were_compared() -> None:
    model = tiny_model()
    ids = token_ids(1, 100)[0].tolist()
    taken = decoded(model, [Encoded(ids, ids)] * 200, pad_id=0)
    tokens = 99 * len(taken.rows)
    assert TOKEN_LIMIT <= tokens < TOKEN_LIMIT + 99 * 40  # a batch has at most 40 of these rows
    assert compare(taken, taken.pieces()).tokens == tokens
