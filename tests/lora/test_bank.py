"""Laws of many adapters on one base: each as it is alone, and the base as it was."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import sys
import threading
import tracemalloc
import warnings
import weakref

import pytest
import torch
from capped_device import CappedDevice
from families import randomize_adapter, refused, relative_error, token_ids, tree_hash
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from qlora_kit import AdapterBank
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, ModelError, NumericError
from qlora_kit.lora import bank as bank_module
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.adapter_files import read_adapter
from qlora_kit.lora.inject import activate, inject_lora, lora_layers, switch_of
from qlora_kit.lora.stack import FROM_STEP
from qlora_kit.memory.counter import StorageCounter, tensor_bytes
from qlora_kit.training.layer_forward import use_fused_blocks

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMS = {
    "a": {"r": 4, "alpha": 8.0},
    "b": {"r": 2, "alpha": 3.0, "target_modules": "all-linear", "adapter_dtype": "bf16"},
    "c": {"r": 7, "target_modules": "o_proj,down_proj", "use_rslora": True},
}
"""Adapters of different ranks, targets, scalings and dtypes."""


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """The folder of one adapter of each form on the llama2 base."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, form) in enumerate(FORMS.items()):
        base = load(bases)
        inject_lora(base.model, LoRAConfig(**form), seed=number)
        randomize_adapter(base.model, seed=number)
        save_adapter(base, root / name)
    return root


@pytest.fixture
def bank(bases, adapters):
    """A bank with `a` and `b` on the base in 16 bits."""
    made = AdapterBank(load(bases))
    for name in "ab":
        made.add(name, adapters / name)
    return made


def load(bases, bits=16, family="llama2"):
    return load_base(str(bases / family), bits=bits, dtype="fp32", device="cpu")


def logits(base, rows=2, length=12):
    with torch.no_grad():
        return base.model(input_ids=token_ids(rows, length), use_cache=False).logits


def settled(base, *shape):
    """Logits once rows have copies of their adapters: bit for bit what further steps give."""
    return [logits(base, *shape) for _ in range(FROM_STEP)][-1]


def hashed(base):
    """SHA-256 of every tensor of the base, adapters left out."""
    found = {}
    for name, tensor in base.model.state_dict().items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found[name.replace(".base_layer", "")] = hashlib.sha256(content).hexdigest()
    return found


def modules(base):
    """Every module of a model with what it holds, by identity."""
    return {
        name: [
            (key, id(value)) for part in (vars(one), one._modules) for key, value in part.items()
        ]
        for name, one in base.model.named_modules()
    }


# Numbers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_each_adapter_of_a_bank_is_what_it_is_alone_and_the_base_is_the_base(
    bases, adapters, bits, fused
):
    base = load(bases, bits)
    if fused:
        assert use_fused_blocks(base.model) is None
    alone, before = logits(base), hashed(base)
    bank, first = AdapterBank(base), {None: alone}
    for name in FORMS:
        bank.add(name, adapters / name)
        assert bank.active is None
        assert torch.equal(logits(base), alone)
    assert bank.names == tuple(FORMS)
    for name in FORMS:
        bank.use(name)
        first[name] = logits(base)
        separate = logits(load_adapter(load(bases, bits), adapters / name))
        assert relative_error(first[name], separate) <= 3e-5
        assert relative_error(first[name], alone) > 1e-2
    for name in ("a", "b", "a", None, "c", "b", None, "a"):
        bank.use(name)
        assert torch.equal(logits(base), first[name])
    assert hashed(base) == before


def test_an_fp32_row_is_the_same_alone_and_among_others_with_an_adapter_in_16_bits(bank):
    ids = token_ids(4, 12)
    with torch.no_grad(), bank.using("b"):
        alone, among = (bank.base.model(input_ids=one).logits[0] for one in (ids[:1], ids))
    assert relative_error(among, alone) < 3e-5  # sums in another order


def test_weights_are_held_once_as_they_are_stored(bank, adapters):
    for name in "ab":
        stored = load_file(adapters / name / WEIGHTS)
        parts = bank.rows([name]).parts
        held = [weight for part in parts.values() for weight in part.weights]
        assert len(held) == len(stored)
        assert {weight.dtype for weight in held} == {tensor.dtype for tensor in stored.values()}
        assert all(weight.is_contiguous() and not weight.requires_grad for weight in held)
        assert bank.rows([name]).nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert not any(".lora_" in name for name, _ in bank.base.model.named_parameters())


@pytest.mark.parametrize(("bits", "fused", "count"), [(4, False, 1000), (8, True, 100)])
def test_a_thousand_switches_over_sixty_four_adapters(bases, tmp_path, bits, fused, count):
    base = load(bases, bits, "shallow")
    if fused:
        assert use_fused_blocks(base.model) is None
    names = [f"task-{number}" for number in range(64)]
    for number, name in enumerate(names):
        drawn_adapter(tmp_path / name, r=1 + number % 7, seed=number)
    before, generator, first = hashed(base), random.Random(0), {}
    bank = AdapterBank(base)
    for name in names:
        bank.add(name, tmp_path / name)
    for name in names:
        bank.use(name)
        first[name] = logits(base, 1, 4)
    held = live_bytes()
    for step in range(count):
        name = generator.choice(names)
        bank.use(name)
        assert torch.equal(logits(base, 1, 4), first[name]), (step, name)
    assert live_bytes() == held
    assert hashed(base) == before


def live_bytes():
    """Bytes of all tensors of the process, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        # Some objects of other libraries warn when they are asked for their class.
        warnings.simplefilter("ignore")
        return tensor_bytes(one for one in gc.get_objects() if isinstance(one, torch.Tensor))


def drawn_adapter(directory, r, seed):
    """An adapter on query and value projections of one layer, of PEFT's least."""
    directory.mkdir()
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        key = f"base_model.model.model.layers.0.self_attn.{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(r, 64, generator=drawn) / 8
        tensors[f"{key}B.weight"] = torch.randn(64, r, generator=drawn) / 8
    save_file(tensors, directory / WEIGHTS)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r}
    config["target_modules"] = ["q_proj", "v_proj"]
    (directory / CONFIG).write_text(json.dumps(config))


# Switching


class Operations(TorchDispatchMode):
    """Counts the operations on tensors while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(work):
    """How many calls, of Python or of C, some work makes."""
    seen = []
    sys.setprofile(lambda frame, event, argument: seen.append(event))
    try:
        work()
    finally:
        sys.setprofile(None)
    return sum("call" in event for event in seen)


def test_a_switch_sets_one_reference_and_nothing_else(bank):
    bank.use("b")
    before = modules(bank.base)
    assert len({id(layer.switch) for layer in lora_layers(bank.base.model).values()}) == 1
    order = ("a", None, "b", "a") * 100
    tracemalloc.start()
    with Operations() as operations:
        for name in order:
            bank.use(name)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for name in order:
            bank.use(name)
        now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert operations.count == 0
    # The loop's own: an iterator, and the frames of a call.
    assert now - held < 200
    assert peak - held < 1000
    assert modules(bank.base) == before


def test_a_switch_takes_as_many_calls_whatever_the_modules_and_adapters(bases, adapters, bank):
    few = calls_of(lambda: bank.use("a"))
    many = AdapterBank(load(bases))
    for number in range(20):
        many.add(f"{number}", adapters / "b")
    many.add("a", adapters / "a")
    assert calls_of(lambda: many.use("a")) == few
    assert calls_of(lambda: many.use("7")) == few
    assert few < 10


def test_using_puts_back_what_took_part_before(bases, adapters):
    base = load(bases)
    inject_lora(base.model, LoRAConfig(r=3))
    randomize_adapter(base.model)
    trained, bank = logits(base), AdapterBank(base)
    bank.add("a", adapters / "a")
    assert bank.active == "default"
    assert torch.equal(logits(base), trained)
    with bank.using("a"):
        ours = logits(base)
        with bank.using(None):
            assert bank.active is None
            assert not torch.equal(logits(base), ours)
        assert torch.equal(logits(base), ours)
        with pytest.raises(ZeroDivisionError), bank.using(None):
            raise ZeroDivisionError
        assert bank.active == "a"
    assert torch.equal(logits(base), trained)
    # Adapters that are injected later read the same reference.
    bank.use("a")
    inject_lora(base.model, LoRAConfig(r=3, target_modules="gate_proj"), adapter="other")
    assert bank.active == "other"
    activate(base.model, None)
    assert bank.active is None
    bank.use("a")
    assert torch.equal(logits(base), ours)


# Adding and removing


def test_names_that_are_unknown_taken_or_none_are_refused(bases, bank, adapters):
    for use in (bank.use, bank.remove, lambda name: bank.rows([name, None, "a"])):
        with pytest.raises(AdapterError, match="the bank has no adapter 'x'; it has a, b"):
            use("x")
    with pytest.raises(AdapterError, match="the bank has no adapter 'a'; it has none: add one"):
        AdapterBank(load(bases)).use("a")
    for add in (bank.add, bank.add_sum):
        with pytest.raises(AdapterError, match="the bank has an adapter 'a' already"):
            add("a", adapters / "b")
        for name in ("", " ", "a\nb", None, 5, "x" * 300):
            with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
                add(name, adapters / "c")
    bank.add("org/sql-v1.2", adapters / "c")
    assert bank.names == ("a", "b", "org/sql-v1.2")


def test_the_active_adapter_stays_and_a_removed_one_leaves_no_tensor(bank, adapters):
    bank.use("a")
    with pytest.raises(AdapterError, match=r"adapter 'a' is active; .*use\(None\)"):
        bank.remove("a")
    mix = bank.rows(["a", "b"])
    with bank.step(mix):
        before = settled(bank.base)
        held = weakref.ref(next(iter(bank.rows(["b"]).parts.values())).weights[0])
        bank.remove("b")
        assert bank.names == ("a",)
        # What is in flight computes with it to its end.
        assert torch.equal(logits(bank.base), before)
        with pytest.raises(AdapterError, match="'a' is active"):
            bank.remove("a")  # a step's mix comes and goes; it is there again afterwards
    assert bank.active == "a"
    bank.use(None)
    del mix
    assert held() is None
    bank.add("b", adapters / "b")
    bank.use("b")


def test_what_is_put_back_stays_and_what_is_switched_in_a_step_holds_after_it(bank):
    bank.use("a")
    with bank.using("b"):
        for name in "ab":
            with pytest.raises(AdapterError, match=f"'{name}' is active"):
                bank.remove(name)
    for inside in (None, "b"):
        bank.use("a")
        with bank.step(None if inside is None else bank.rows([inside])):
            bank.use(None)
            assert bank.active == inside
        assert bank.active is None
    bank.use("a")
    with bank.step(bank.rows(["b"])):
        bank.remove("b")
    activate(bank.base.model, None)
    bank.remove("a")
    assert (bank.names, bank.active) == ((), None)


def test_rows_of_a_removed_adapter_go_on_and_the_bank_holds_nothing_of_it(bank):
    rows = [bank.rows([name]) for name in "ab"]
    held = weakref.ref(next(iter(rows[1].parts.values())).weights[0])
    bank.remove("b")
    assert bank.together(rows).name == "by row: a, b"  # as when another of their batch leaves
    rows.clear()
    assert held() is None


def test_an_adapter_can_be_removed_while_another_is_read(bank, adapters, monkeypatch):
    """In the middle of reading, and where that takes the name that is read for."""
    reading, read = threading.Event(), threading.Event()
    files = read_adapter(adapters / "c")
    real, failed = bank_module.open_adapter, []

    def slow(*given):
        reading.set()
        assert read.wait(60)
        return real(*given)

    def add():
        try:
            bank.add("b2", files)
        except AdapterError as error:
            failed.append(str(error))

    monkeypatch.setattr(bank_module, "open_adapter", slow)
    thread = threading.Thread(target=add)
    thread.start()
    assert reading.wait(60)
    other = threading.Thread(target=lambda: (bank.remove("b"), bank.add_sum("b2", {"a": 1})))
    other.start()
    other.join(20)
    waited = other.is_alive()
    read.set()
    for one in (thread, other):
        one.join()
    assert not waited
    assert "has an adapter 'b2' already" in failed[0]
    assert bank.names == ("a", "b2")


def spoil_last(directory):
    tensors = load_file(directory / WEIGHTS)
    key = max(tensors)
    tensors[key][-1, -1] = float("nan")
    save_file(tensors, directory / WEIGHTS)


@pytest.fixture
def intact(bases, adapters):
    """A bank with one adapter in use, which is the same after what fails."""
    bank = AdapterBank(load(bases))
    bank.add("a", adapters / "a")
    bank.use("a")
    before, held, numbers = modules(bank.base), hashed(bank.base), logits(bank.base)
    yield bank
    assert (bank.names, bank.active) == (("a",), "a")
    assert modules(bank.base) == before
    assert hashed(bank.base) == held
    assert torch.equal(logits(bank.base), numbers)


@pytest.fixture
def adapter(adapters, tmp_path):
    """A copy of an adapter on all linears, to spoil."""
    target = tmp_path / "b"
    target.mkdir()
    for file in (adapters / "b").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_value_that_is_not_finite_in_the_last_tensor_changes_nothing(intact, adapter):
    spoil_last(adapter)
    with refused(NumericError, "holds 1 values that are not finite", directory=adapter):
        intact.add("b", adapter)


def test_a_file_that_ends_after_its_header_was_read_changes_nothing(intact, adapter):
    files = read_adapter(adapter)
    with open(adapter / WEIGHTS, "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    with refused(ModelError, "ended early", directory=adapter):
        intact.add("b", files)


def test_another_base_and_other_shapes_change_nothing(intact, bases, adapter):
    other = AdapterBank(load(bases, family="llama3"))
    with refused(AdapterError, "was trained on llama2 with other weights", directory=adapter):
        other.add("b", adapter)
    with refused(AdapterError, "expected [32, 2]", directory=adapter):
        other.add("b", adapter, allow_other_base=True)
    assert not lora_layers(other.base.model)
    (adapter / WEIGHTS).unlink()
    with refused(AdapterError, f"holds no {WEIGHTS}", directory=adapter):
        intact.add("b", adapter)


def test_memory_that_ends_at_any_moment_changes_nothing(bases, intact, adapters):
    def add(bank):
        bank.add("b", adapters / "b")

    def add_sum(bank):
        bank.add_sum("s", {"a": 0.5})

    roomy = AdapterBank(load(bases))
    roomy.add("a", adapters / "a")
    for work in (add, add_sum):
        with StorageCounter() as counter:
            work(roomy)
        for part in range(12):
            with CappedDevice(counter.peak * part // 12), pytest.raises(torch.OutOfMemoryError):
                work(intact)
    assert roomy.names == ("a", "b", "s")


# Sums


def test_a_weighted_sum_is_the_sum_of_the_updates(bases, bank, adapters):
    bank.add("c", adapters / "c")
    weights = {"a": 0.7, "b": -0.3, "c": 2}
    bank.add_sum("mix", weights)
    assert bank.active is None
    summed = bank.rows(["mix"])
    expected = {}
    for name, weight in weights.items():
        for layer, part in bank.rows([name]).parts.items():
            a, b = (one.double() for one in part.weights)
            update = weight * part.scaling * (b @ a)
            expected[layer] = expected.get(layer, 0) + update
    assert summed.parts.keys() == expected.keys()
    for layer, part in summed.parts.items():
        a, b = (one.double() for one in part.weights)
        assert relative_error(part.scaling * (b @ a), expected[layer]) <= 1e-6
    layer = lora_layers(bank.base.model)["model.layers.0.self_attn.q_proj"]
    assert summed.parts[layer].weights[0].shape[0] == 4 + 2
    assert summed.parts[layer].dtype is torch.float32
    # Only b is on the gate, in its own dtype, scaled by 1.5 = 3 / 2.
    gate = summed.parts[lora_layers(bank.base.model)["model.layers.0.mlp.gate_proj"]]
    assert gate.dtype is torch.bfloat16
    assert gate.scaling == pytest.approx(-0.3 * 1.5)


def test_a_sum_of_one_is_that_one_and_equal_ones_are_not_rounded(bank, adapters):
    bank.add("again", adapters / "b")
    bank.add_sum("one", {"b": 1.0})
    bank.add_sum("halves", {"b": 0.5, "again": 0.5})
    bank.use("b")
    alone = logits(bank.base)
    bank.use("one")
    assert torch.equal(logits(bank.base), alone)
    for layer, part in bank.rows(["halves"]).parts.items():
        original = bank.rows(["b"]).parts[layer]
        assert torch.equal(part.weights[1], torch.cat([original.weights[1]] * 2, dim=1))
    bank.add_sum("off and on", {"a": 0, "b": 1})
    assert bank.rows(["off and on"]).parts.keys() == bank.rows(["b"]).parts.keys()


def test_a_sum_is_what_peft_makes_of_it(bases, bank, adapters):
    plain = AutoModelForCausalLM.from_pretrained(bases / "llama2", dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(plain, adapters / "a", adapter_name="a")
    theirs.load_adapter(adapters / "c", "c")
    theirs.add_weighted_adapter(["a", "c"], [0.7, 0.3], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    bank.add("c", adapters / "c")
    bank.add_sum("sum", {"a": 0.7, "c": 0.3})
    bank.use("sum")
    with torch.no_grad():
        expected = theirs(input_ids=token_ids(2, 12), use_cache=False).logits
    assert relative_error(logits(bank.base), expected) <= 1e-5


@pytest.mark.parametrize(
    "weights", [{}, {"a": 0.0}, {"a": float("nan")}, {"a": True}, {"a": "1"}, {"a": 1, "b": 1e400}]
)
def test_weights_of_a_sum_that_are_none_are_refused(bank, weights):
    with pytest.raises(AdapterError, match="the weights of a sum must be numbers, not all 0, got"):
        bank.add_sum("s", weights)
    assert bank.names == ("a", "b")


# Threads


def test_adding_and_removing_while_another_thread_decodes(bases, adapters):
    base = load(bases)
    bank = AdapterBank(base)
    bank.add("a", adapters / "a")
    switch = switch_of(base.model)
    cases = [bank.rows(names) for names in ([None, None], ["a", "a"], ["a", None])]
    expected = []
    for case in cases:
        switch.active = case
        expected.append(settled(base, 2, 4))
    failed, steps, done = [], [], threading.Event()

    def decode():
        try:
            while not done.is_set():
                steps.append((len(steps) + 1) % 3)
                switch.active = cases[steps[-1]]
                if not torch.equal(logits(base, 2, 4), expected[steps[-1]]):
                    failed.append(steps[-1])
        except Exception as error:
            failed.append(error)

    before = tree_hash(adapters)
    thread = threading.Thread(target=decode)
    thread.start()
    try:
        for _ in range(6):
            for name in "bc":
                bank.add(name, adapters / name)
            bank.add_sum("s", {"a": 0.5, "b": 0.5, "c": 1})
            for name in "bcs":
                bank.remove(name)
    finally:
        done.set()
        thread.join()
    assert failed == []
    assert len(steps) > 3
    assert bank.names == ("a",)
    assert tree_hash(adapters) == before
