"""Laws of models with convolutions and recurrences: no row reads another, however it is batched."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from counted_steps import counted_step
from exact import adapter_gradients, exact_gradients, gradient_errors
from families import FAMILIES, edit_weights, refused, relative_error, tiny_model, token_ids
from hybrids import HYBRIDS, save_hybrid, tiny_hybrid
from micro_batches import trained
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from trained import trained_base, write_rows
from transformers import AutoModelForCausalLM

from qlora_kit import finetune
from qlora_kit.base.config_only import open_shape
from qlora_kit.base.linear import QuantizedLinear, dequantize
from qlora_kit.base.load import load_base
from qlora_kit.base.recurrence import avoid_fused_training, check_packing, state_carriers
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import collate, collate_packs
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError
from qlora_kit.export.export import export_model
from qlora_kit.generation.decode import generate_ids
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.inject import lora_layers
from qlora_kit.memory.counter import COMPONENTS, most_of_each
from qlora_kit.plan.extrapolate import cut, layers_of
from qlora_kit.plan.fake_model import FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.plan.plan_memory import plan_memory
from qlora_kit.training.layer_forward import set_recompute
from qlora_kit.training.loop import train
from qlora_kit.training.loss import supervised_loss
from qlora_kit.training.optimizer import make_optimizer

TOLERANCE = 1e-5
"""fp32 sums in another order; a recurrence adds the rounding of one token to the next."""
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp("hybrids")
    for kind in HYBRIDS:
        save_hybrid(root / kind, kind, **(SHALLOW if kind == "qwen3_5_text" else {}))
    return root


def rows_of(*lengths):
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 264, (length,), generator=drawn).tolist() for length in lengths]
    return [Encoded(row, row) for row in ids]


def adapted(bases, kind, bits=16, **lora):
    config = LoRAConfig(r=4, alpha=6, target_modules="all-linear", **lora)
    options = {"bits": bits, "dtype": "fp32", "device": "cpu"}
    return trained_base(bases / kind, lora=config, **options).model.train()


def gradients(model, rows):
    model.zero_grad()
    loss = supervised_loss(model, collate(rows, 0))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


BITS = [*((kind, 4) for kind in HYBRIDS), ("qwen3_5_text", 8), *((k, 16) for k in HYBRIDS)]


@pytest.mark.parametrize(("kind", "bits"), BITS)
def test_logits_are_those_of_transformers_and_gradients_those_of_autograd(bases, kind, bits):
    ids = token_ids()
    if bits == 16:
        plain = load_base(str(bases / kind), bits=16, dtype="fp32", device="cpu").model
        theirs = type(plain).from_pretrained(bases / kind).eval()
        with torch.no_grad():
            found, expected = (m(input_ids=ids, use_cache=False).logits for m in (plain, theirs))
        assert relative_error(found, expected) <= TOLERANCE

    def loss(reference: torch.nn.Module) -> Tensor:
        logits = reference(input_ids=ids, use_cache=False).logits.double()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    model = adapted(bases, kind, bits)
    gradients(model, [Encoded(row, row) for row in ids.tolist()])
    assert max(gradient_errors(adapter_gradients(model), exact_gradients(model, loss))) <= TOLERANCE


@pytest.mark.parametrize("kind", HYBRIDS)
def test_rows_of_a_batch_are_each_row_alone_at_every_level(bases, kind):
    """Padding stands behind the tokens, where nothing reads it."""
    model = adapted(bases, kind, 8, dropout=0.1)
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"].p = 0.0  # a mask belongs to a place in a batch
    rows = rows_of(70, 23, 41)
    loss, found = gradients(model, rows)
    alone = [gradients(model, [row]) for row in rows]
    assert relative_error(loss, sum(one for one, _ in alone)) <= TOLERANCE
    for name, gradient in found.items():
        assert relative_error(gradient, sum(each[name] for _, each in alone)) <= TOLERANCE, name
    for layer in lora_layers(model).values():
        layer.lora_dropout["default"].p = 0.1
    loss, found = gradients(model, rows)
    for level in ("full", "selective") if kind == "qwen3_5_text" else ("full",):
        set_recompute(model, level)
        again, same = gradients(model, rows)
        assert torch.equal(again, loss)
        assert all(torch.equal(same[name], found[name]) for name in found)


def test_what_servers_drop_is_left_alone(bases):
    """The two small projections of the gated delta rule: neither quantized nor adapted."""
    model = adapted(bases, "qwen3_5_text", 4)
    mixer = model.model.layers[0].linear_attn
    for name in ("in_proj_a", "in_proj_b"):
        assert type(getattr(mixer, name)) is torch.nn.Linear
    for name in ("in_proj_qkv", "in_proj_z", "out_proj"):
        assert isinstance(getattr(mixer, name).base_layer, QuantizedLinear)
    named = trained_base(
        bases / "qwen3_5_text", lora=LoRAConfig(r=4, target_modules="in_proj_a"), dtype="fp32"
    ).model
    assert {name.split(".")[-4] for name in trained(named)} == {"in_proj_a"}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_rows_of_a_pack_would_leak(kind):
    """What is refused is wrong indeed: the second row of a pack reads the first one."""
    model = tiny_hybrid(kind)
    first, second = (torch.tensor([row.input_ids]) for row in rows_of(20, 12))
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(20), torch.arange(12)))[None]
    with torch.no_grad():
        alone = model(input_ids=second, use_cache=False).logits
        beside = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, 20:]
    assert relative_error(beside, alone) > 1e-3


@pytest.mark.parametrize("kind", HYBRIDS)
def test_packs_are_refused(kind):
    model = tiny_hybrid(kind)
    assert all("conv" in name for name in state_carriers(model))
    rows = rows_of(9, 5)
    with pytest.raises(ConfigError, match=f"packing.*{kind}.*conv"):
        supervised_loss(model, collate_packs([rows], 0))
    assert not collate(rows, 0)["packed"]
    assert not collate_packs([[row] for row in rows], 0)["packed"]


def test_a_recurrence_without_a_convolution_is_found():
    """By what transformers keeps of a layer between tokens, or by what its class says."""
    model = tiny_hybrid("lfm2")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Conv1d):
            model.get_submodule(name.rpartition(".")[0]).conv = torch.nn.Identity()
    assert state_carriers(model) == ["conv layers"]
    model.config.layer_types = ["full_attention"] * 3
    assert state_carriers(model) == []
    model._is_stateful = True
    assert state_carriers(model) == ["Lfm2ForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_alone_packs(family):
    check_packing(tiny_model(family))


@pytest.mark.parametrize("kind", ["qwen3_5_text", "nemotron_h"])
def test_recurrences_keep_the_dtype_of_their_files(tmp_path, kind):
    """A rounded logarithm of a decay is another decay; a step and an export in bf16 keep it."""
    save_hybrid(tmp_path / "base", kind, torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    precise: dict[str, Tensor] = {}

    def widen(tensors):
        for name, tensor in tensors.items():
            if name.endswith("A_log"):
                tensors[name] = torch.rand(tensor.shape, generator=drawn)
                precise[name] = tensors[name]

    edit_weights(tmp_path / "base", widen)
    base = trained_base(tmp_path / "base", bits=4, dtype="bf16", device="cpu")
    held = {n: p for n, p in base.model.named_parameters() if p.dtype is torch.float32}
    assert {n for n in held if "lora" not in n} == {
        n.replace("backbone.", "model.") for n in precise
    }
    loss, _ = gradients(base.model.train(), rows_of(20, 9))
    assert loss.isfinite()
    export_model(base, tmp_path / "merged", dtype="bf16")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(written[name], precise[name]) for name in precise)
    others = {tensor.dtype for name, tensor in written.items() if name not in precise}
    assert others == {torch.bfloat16}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_generation_is_transformers_own_whatever_stands_beside_a_prompt(bases, kind):
    """With the state of a recurrence as the cache; prompts of one length alone share a batch."""
    model = load_base(str(bases / kind), bits=16, dtype="fp32", device="cpu").model
    theirs = type(model).from_pretrained(bases / kind).eval()
    prompts = [row.input_ids for row in rows_of(5, 20, 5, 2)]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    steps = generate_ids(model, prompts, max_new_tokens=8, eos_ids=[], pad_id=0)
    answers = zip(*steps, strict=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), **options)
        assert list(answer) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", HYBRIDS)
def test_peft_reads_the_adapter_and_transformers_the_merge(bases, kind, tmp_path):
    base = trained_base(
        bases / kind,
        lora=LoRAConfig(r=4, alpha=6, target_modules="all-linear"),
        bits=4,
        dtype="fp32",
    )
    save_adapter(base, tmp_path / "adapter")
    export_model(base, tmp_path / "merged")
    ids = token_ids()
    with torch.no_grad():
        expected = base.model(input_ids=ids, use_cache=False).logits
    plain = AutoModelForCausalLM.from_pretrained(bases / kind, dtype=torch.float32)
    for name, module in base.model.named_modules():
        if isinstance(module, QuantizedLinear):
            own = plain.get_submodule(name.removesuffix(".base_layer"))
            own.weight.data = dequantize(module, torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model in (PeftModel.from_pretrained(plain, tmp_path / "adapter"), merged):
        with torch.no_grad():
            found = model.eval()(input_ids=ids, use_cache=False).logits
        assert relative_error(found, expected) <= TOLERANCE
    written, original = (
        load_file(path / "model.safetensors").keys() for path in (tmp_path / "merged", bases / kind)
    )
    assert written == original


def test_packing_is_refused_before_the_weights(bases, tmp_path, monkeypatch):
    """By the command, by the plan and by `finetune()`; nothing is written."""
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(bases / "qwen3_5_text", tmp_path / "base")
    options = {"model": str(base), "packing": True, "device": "cpu"}
    said = ("packing", "qwen3_5_text", "linear_attn.conv1d")
    with refused(ConfigError, *said, directory=tmp_path, seconds=10):
        finetune(**options, data="rows.jsonl", output_dir="out", token_cache="cache")
    with refused(ConfigError, *said, directory=tmp_path, seconds=10):
        plan_memory(BaseConfig(str(base), device="cpu"), length=64, packing=True)
    rows = rows_of(9, 5)
    schedule = StepSchedule.of_run(rows, DataConfig("x", packing=True), TrainingConfig(), 0)
    model = adapted(bases, "qwen3_5_text")
    with pytest.raises(ConfigError, match=r"packing.*conv1d"):
        train(model, schedule, make_optimizer("adamw", model.parameters(), 1e-3))


def counted_peaks(base, lora, training, micro_batches):
    """The peaks of a real second step by phase, and the most bytes of each component."""
    level, first = training.gradient_checkpointing, collate(rows_of(16), 0)
    intervals = counted_step(base, lora, training, level, micro_batches, first)
    phases = {
        phase: max(one.peak for one in intervals if one.phase == phase)
        for phase in ("forward", "backward", "step")
    }
    passes = [one for one in intervals if one.phase != "step"]
    found = most_of_each(passes) | {"optimizer": passes[0].start["optimizer"]}
    return phases, {name: found.get(name, 0) for name in COMPONENTS}


PLANNED = [
    ("qwen3_5_text", 4, "none"),
    ("lfm2", 8, "selective"),
    ("granitemoehybrid", 16, "none"),
    ("nemotron_h", 8, "full"),
    ("falcon_h1", 4, "selective"),
]


@pytest.mark.parametrize(("kind", "bits", "level"), PLANNED)
def test_planned_equals_counted(bases, kind, bits, level):
    """Their fp32 work included; 40 tokens are chunks of 64, or of 16 and a part of one."""
    base = BaseConfig(str(bases / kind), bits=bits, dtype="bf16", device="cpu")
    lora = LoRAConfig(r=4, target_modules="all-linear" if bits == 4 else "auto")
    training = TrainingConfig(
        optim="adamw", gradient_checkpointing=level, batch_size=2, gradient_accumulation_steps=2
    )
    plan = plan_memory(base, lora, training, length=48)
    phases, bytes_ = counted_peaks(
        base, lora, training, [collate(rows_of(48, 48), 0) for _ in (1, 2)]
    )
    assert {phase: plan.phases[phase] for phase in phases} == phases
    assert {name: plan.bytes[name] for name in bytes_} == bytes_


def test_a_pattern_of_layers_is_extended_exactly(tmp_path):
    """Every interval with all its components, as if all layers were traced."""
    kinds = ["conv", "full_attention"] * 5
    settings = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    save_hybrid(tmp_path / "base", "lfm2", torch.bfloat16, **settings)
    base, cpu = BaseConfig(str(tmp_path / "base"), device="cpu"), torch.device("cpu")
    fake = FakeModel(open_shape(base, cpu), LoRAConfig(r=4), TrainingConfig(), cpu)
    run = FakeRun(fake)
    assert layers_of(cut(fake.kinds)) == [0, 1, 2, 3, 8, 9]
    micro_batches = run.micro_batches(1, 32, 16, 2)
    levels = ["full"] * 9 + ["none"]
    assert run.passes(micro_batches, levels) == run.trace(micro_batches, range(10), levels)


def test_no_fused_kernel_takes_the_weights_past_the_layers(monkeypatch):
    """The kernel of `mamba_ssm` reads `out_proj.weight` itself; its parts still train."""
    model = tiny_hybrid("bamba")
    avoid_fused_training(model)
    asked = []
    module = __import__(type(model).__module__, fromlist=["x"])
    monkeypatch.setattr(
        module, "mamba2_split_conv1d_scan_combined", lambda *a, **k: asked.append(a)
    )
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert not asked
    assert model.model.layers[0].mamba.out_proj.training
