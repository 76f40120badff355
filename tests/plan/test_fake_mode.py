"""Laws of the plan's fake tensors: what is made again is what torch would have answered."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from families import save_checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.plan import fake_model
from qlora_kit.plan.fake_mode import FakeMode
from qlora_kit.plan.memory_plan import BatchShape
from qlora_kit.plan.plan import Planner

SMALL = {"num_hidden_layers": 4, "max_position_embeddings": 512}


def facts(tensor):
    return (
        *(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device),
        *(tensor.untyped_storage().nbytes(), torch._C._dispatch_key_set(tensor)),
    )


def one_and_again(mode, operation, *shapes):
    """Twice the same on new tensors: the arguments, the results."""
    with mode:
        twice = [[torch.empty(shape) for shape in shapes] for _ in range(2)]
        return [(given, operation(*given)) for given in twice]


OPERATIONS = {
    "new": (lambda x, y: x @ y, (3, 4), (4, 5)),
    "expanded": (lambda x: x.expand(7, 3), (1, 3)),
    "part of a view": (lambda x: x.t()[2:, 1:3], (5, 6)),
    "unsafe view": (lambda x: torch.ops.aten._unsafe_view(x, (6,)), (2, 3)),
    "several": (lambda x: torch.split(x, 2)[1], (5, 2)),
    "in another dtype": (lambda x: x.to(torch.bfloat16).view(torch.int16), (4, 2)),
    "in place": (lambda x, y: x.add_(y), (3,), (3,)),
    "into another": (lambda x, y: torch.mul(x, 2, out=y), (3,), (3,)),
    "by a number": (lambda x: x.to(torch.int32) * 1.0, (3,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_again_what_it_gave(name):
    """Its shape, strides, dtype and bytes; the memory of an argument, or the argument."""
    operation, *shapes = OPERATIONS[name]
    found = one_and_again(FakeMode(), operation, *shapes)
    asked = one_and_again(FakeTensorMode(), operation, *shapes)
    for (given, result), (others, expected) in zip(found, asked, strict=True):
        assert isinstance(result, FakeTensor)
        assert facts(result) == facts(expected)
        pairs = zip(given, others, strict=True)
        assert [result is one for one, _ in pairs] == [expected is one for one in others]
        shared = [
            [one.untyped_storage()._cdata == of.untyped_storage()._cdata for one in among]
            for of, among in ((result, given), (expected, others))
        ]
        assert shared[0] == shared[1]


def test_numbers_of_other_types_are_other_operations():
    with FakeMode():
        whole = torch.empty(3, dtype=torch.int64)
        dtypes = [(whole * other).dtype for other in (1, 1.0, True, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64]


def test_what_depends_on_values_is_asked_each_time():
    """A constant is known to torch for as long as nobody writes into it."""
    with FakeMode() as mode:
        for number in (3, 5):
            assert torch.tensor(number).item() == number
        mask, x = torch.empty(4, dtype=torch.bool), torch.empty(4)
        for _ in range(2):
            with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
                x[mask]
    assert not any("nonzero" in str(key[0]) or "lift" in str(key[0]) for key in mode._known)


@pytest.mark.parametrize(("family", "device"), [("llama3", "cuda"), ("gemma2", "cpu")])
def test_a_plan_is_that_of_torchs_fake_tensors(family, device, tmp_path, monkeypatch):
    """Every component of every interval of loading, passes and update, and all work noted."""
    save_checkpoint(tmp_path / "base", family, torch.bfloat16, **SMALL)
    lora = LoRAConfig(target_modules="all-linear", dropout=0.1)
    options = BaseConfig(str(tmp_path / "base"), bits=4), lora, TrainingConfig(), device

    def intervals():
        planner = Planner(*options)
        for where in (planner.placements[0], planner.placements[-1]):
            planner.plan(BatchShape(1, 64, 64), "full", placement=where)
            run = planner.run
            batches = run.micro_batches(2, 128, 100, 2)
            passes = run.passes(batches, ["full", "selective", "none", "none"])
            yield from map(astuple, (*run.loading, *passes, *run.updates))

    found = list(intervals())
    monkeypatch.setattr(fake_model, "FakeMode", lambda: FakeTensorMode(allow_non_fake_inputs=True))
    assert found == list(intervals())
