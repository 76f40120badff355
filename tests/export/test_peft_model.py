"""A base with adapters becomes PEFT's model on bitsandbytes' layers and comes back, in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from families import save_checkpoint
from torch import Tensor

from qlora_kit.base.base import Base
from qlora_kit.base.linear import QuantizedLinear
from qlora_kit.base.load import load_base, read_weights
from qlora_kit.base.open import open_base
from qlora_kit.base.tagged import tag_weights
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.errors import AdapterError, NumericError, ResourceError
from qlora_kit.export.peft_model import from_peft, to_peft
from qlora_kit.lora.adapter import load_adapter, save_adapter
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.inject import activate, inject_lora, lora_layers, tag_adapters, train_only
from qlora_kit.memory.counter import StorageCounter
from qlora_kit.training.prepare import prepare_model

Passed = tuple[Tensor, dict[str, Tensor]]
PAIRS = [
    {"prompt": f"w{n % 9} w{n + 1}", "chosen": " w3 w4 w5", "rejected": f" w{n % 7} w8"}
    for n in range(24)
]


def adapted(name: str, bits: int, **options: Any) -> Base:
    """A base in fp32 with an adapter that does something."""
    base = load_base(name, bits=bits, dtype="fp32", device="cpu")
    inject_lora(base.model, LoRAConfig(r=4, **options))
    fill(base, "default", 0)
    return base


def narrow(base: Base) -> dict[str, Tensor]:
    """What is held in 16 bits and computed with in fp32."""
    return {
        name: parameter
        for name, parameter in base.model.named_parameters()
        if name.replace(".base_layer", "") in base.narrow and parameter.is_floating_point()
    }


def tiny() -> Base:
    return load_base("tiny", bits=4, dtype="fp32", device="cpu")


def fill(base: Base, adapter: str, seed: int) -> None:
    for place, layer in enumerate(lora_layers(base.model).values()):
        draw = torch.Generator().manual_seed(1000 * seed + place)
        weight = layer.weights(adapter)[1]
        weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.05)


def passed(model: Any) -> Passed:
    """Logits and adapter gradients on random tokens, by PEFT's names of the parameters."""
    model.train()
    model.zero_grad()
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 20, (2, 32), generator=draw)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    named = ((n.removeprefix("base_model.model."), p) for n, p in model.named_parameters())
    return out.logits.detach().clone(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_peft_computes_what_we_do_and_gives_the_same_base_back(bits: int, targets: str) -> None:
    base = adapted("tiny", bits, target_modules=targets)
    linears = [m for m in base.model.modules() if isinstance(m, QuantizedLinear)]
    ours = passed(base.model)
    held = {n: p.detach().clone() for n, p in narrow(base).items()}
    before = {n: p.data_ptr() for n, p in base.model.named_parameters() if n not in held}
    model = to_peft(base)
    assert isinstance(model, peft.PeftModel)
    after = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    # Nothing is there twice: every parameter lies where it lay, but those that PEFT needs wider.
    assert {n: p.data_ptr() for n, p in after.items() if n not in held} == before
    assert all(after[name].dtype is torch.float32 for name in held)
    # A copy of a module, which PEFT trains, would go on with the weight of the one it is of.
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert bool(linears) == (bits < 16)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    theirs = passed(model)
    # Twice what was measured: bitsandbytes scales rows of 8 bits in another order.
    assert distance(theirs[0], ours[0]) <= 1e-5
    assert theirs[1].keys() == ours[1].keys()
    assert max(distance(theirs[1][name], grad) for name, grad in ours[1].items()) <= 1e-5
    assert from_peft(model, base) is base
    now = dict(base.model.named_parameters())
    assert all(now[n].dtype is p.dtype and torch.equal(now[n], p) for n, p in held.items())
    train_only(base.model, "default")
    again = passed(base.model)
    assert torch.equal(again[0], ours[0])
    assert all(torch.equal(again[1][name], grad) for name, grad in ours[1].items())


@pytest.mark.parametrize("own", ["auto", "fp32"])
def test_an_adapter_comes_back_in_the_dtype_that_it_had(own: str, tmp_path: Path) -> None:
    """The same files and logits, over masters that are still those of PEFT; one added as saved."""
    base = load_base("tiny", bits=4, dtype="bf16", device="cpu")
    inject_lora(base.model, LoRAConfig(r=4, adapter_dtype=own))
    fill(base, "default", 0)
    save_adapter(base, tmp_path / "before")
    before = logits(base.model)
    model = to_peft(base)
    model.add_adapter("added", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    from_peft(model, base)
    save_adapter(base, tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert torch.equal(logits(base.model), before)
    layer = next(iter(lora_layers(base.model).values()))
    master = layer.weights("default")[1]
    assert not torch.equal(master, master.bfloat16().float())
    assert layer.adapter_dtypes["added"] is torch.float32


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_way_over_takes_no_more_than_the_adapter_once_more(bits: int) -> None:
    """PEFT makes its own matrices before ours take their place; no weight is copied for it.

    Those that are held in 16 bits and computed with in fp32 are widened: PEFT casts no weight.
    """
    base, counter = adapted("tiny", bits, target_modules="all-linear"), StorageCounter()
    tag_weights(base.model, counter.tag)
    tag_adapters(base.model, counter.tag)
    adapter = sum(p.nbytes for p in base.model.parameters() if p.requires_grad)
    linears = lora_layers(base.model)
    wider = sum(base.dtype.itemsize * p.numel() for p in narrow(base).values())
    with counter:
        counter.at("over")
        to_peft(base)
    (over,) = [one for one in counter.intervals if one.phase]
    # The tables of 4-bit values and of scales, which bitsandbytes has a copy of for each linear.
    tables = 2048 * len(linears) if bits == 4 else 0
    assert over.peak - sum(over.start.values()) <= 1.5 * adapter + tables + wider


def test_a_prepared_model_leaves_with_its_own_code(tmp_path: Path) -> None:
    """Fused blocks, recompute and attention by rows are ours; other programs bring their own."""
    base = adapted("tiny", 4)
    plain = passed(base.model)
    prepare_model(base.model, TrainingConfig(), "full")
    theirs = passed(to_peft(base))
    assert distance(theirs[0], plain[0]) <= 1e-5


def test_several_adapters_go_and_come_with_their_ranks_and_the_active_one() -> None:
    base = adapted("tiny", 4)
    inject_lora(base.model, LoRAConfig(r=3, alpha=5, target_modules="all-linear"), adapter="other")
    fill(base, "other", 1)
    outputs = {}
    for name in ("default", "other"):
        activate(base.model, name)
        outputs[name] = logits(base.model)
    model = to_peft(base)
    assert model.active_adapter == "other"
    for name, expected in outputs.items():
        model.set_adapter(name)
        assert distance(logits(model), expected) <= 1e-5
    from_peft(model, base)
    for name, expected in outputs.items():
        activate(base.model, name)
        assert torch.equal(logits(base.model), expected)


def test_what_peft_would_compute_on_other_numbers_is_refused(tmp_path: Path) -> None:
    """A streamed base, whose weights come and go, and an adapter that is a bank's."""
    streamed = open_base(BaseConfig("tiny", bits=4, dtype="fp32", device="cpu"))
    read_weights(streamed, placement=Placement(base_on_host=True))
    inject_lora(streamed.model, LoRAConfig(r=4))
    with pytest.raises(ResourceError, match="is streamed"):
        to_peft(streamed)
    base = adapted("tiny", 4)
    save_adapter(base, tmp_path)
    bank = AdapterBank(base)
    bank.add("one", tmp_path)
    bank.use("one")
    with pytest.raises(AdapterError, match="'one', which takes part, is a bank's"):
        to_peft(base)
    assert bank.active == "one"
    bank.use(None)
    from_peft(to_peft(base), base)
    with pytest.raises(AdapterError, match="make a new AdapterBank"):
        bank.use("one")


@pytest.mark.parametrize("change", ["merged", "dora", "name", "nan", "head"])
def test_what_cannot_come_back_leaves_the_model_as_it_was(change: str) -> None:
    base = adapted("tiny", 4)
    model = to_peft(base)
    if change == "merged":
        model.merge_adapter()
    else:
        name = "a\nb" if change == "name" else "other"
        targets = ["lm_head" if change == "head" else "q_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, use_dora=change == "dora")
        model.add_adapter(name, config)
    if change == "nan":
        layer = base.model.get_submodule("model.layers.1.self_attn.q_proj")
        layer.lora_B["other"].weight.data[2, 1] = math.nan
    before = logits(model)
    said = {
        "merged": "merged into",
        "dora": "'other': .* use_dora",
        "name": "b' cannot be the name",
        "nan": r"'other': .*q_proj.lora_B.weight .*finite",
        "head": "'other': .* asks for lm_head",
    }
    with pytest.raises((AdapterError, NumericError), match=said[change]):
        from_peft(model, base)
    assert torch.equal(logits(model), before)
    if change in ("dora", "nan", "head"):
        model.delete_adapter("other")
        assert from_peft(model, base) is base


def logits(model: Any) -> Tensor:
    """On the tokens of `passed`, in training mode, in which bitsandbytes rounds no activations."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        found: Tensor = model.train()(torch.randint(3, 20, (2, 32), generator=draw)).logits
    return found


def sft(model: Any, base: Base, folder: Path) -> Any:
    rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in PAIRS]
    options = trl.SFTConfig(max_length=64, **settings(folder))
    return trl.SFTTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )


def dpo(model: Any, base: Base, folder: Path) -> Any:
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(max_length=64, **settings(folder)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=base.tokenizer,
    )


def plain(model: Any, base: Base, folder: Path) -> Any:
    """transformers' own trainer, on rows that are tokens already."""
    tokens = [base.tokenizer.encode(one["prompt"] + one["chosen"])[:8] for one in PAIRS]
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens if len(ids) == 8]
    assert len(rows) > 8
    options = transformers.TrainingArguments(**settings(folder))
    return transformers.Trainer(model=model, args=options, train_dataset=Dataset.from_list(rows))


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 4e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@pytest.mark.parametrize("make", [plain, sft, dpo])
def test_trainers_of_transformers_and_trl_train_it_and_save_what_everyone_reads(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    base = adapted("tiny", 4)
    model = to_peft(base)
    trainer = make(model, base, tmp_path)
    start = passed(model)[0]
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert distance(passed(model)[0], start) > 1e-3
    # Nothing but an adapter was saved; TRL holds those of quantized models in bf16.
    assert not list((tmp_path / "adapter").glob("model*"))
    theirs = logits(loaded_by_peft(base, tmp_path / "adapter"))
    fresh = load_adapter(tiny(), tmp_path / "adapter")
    assert distance(logits(fresh.model), theirs) <= 1e-5
    # And what ours saves of it is the same adapter.
    from_peft(model, base)
    save_adapter(base, tmp_path / "ours")
    assert distance(logits(loaded_by_peft(base, tmp_path / "ours")), theirs) <= 1e-6


def loaded_by_peft(base: Base, adapter: Path) -> Any:
    """An adapter as PEFT loads it, on the same files as transformers quantizes them."""
    form = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base.source.directory, quantization_config=form, dtype=torch.float32, device_map="cpu"
    )
    return peft.PeftModel.from_pretrained(model, adapter)


def test_a_base_without_adapter_and_a_shape_that_would_be_wrong_are_refused(
    tmp_path: Path,
) -> None:
    base = tiny()
    with pytest.raises(AdapterError, match="to_peft: the model has no adapter"):
        to_peft(base)
    save_checkpoint(tmp_path / "base", "llama_bias", torch.float32)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["intermediate_size"] % 64
    odd = adapted(str(tmp_path / "base"), 4)
    ours = passed(odd.model)
    with pytest.raises(ResourceError, match="no multiple of 64"):
        to_peft(odd)
    assert torch.equal(passed(odd.model)[0], ours[0])
    with pytest.raises(AdapterError, match="not made of this base"):
        from_peft(odd.model, base)
    model = to_peft(adapted(str(tmp_path / "base"), 8))
    assert distance(passed(model)[0], passed(adapted(str(tmp_path / "base"), 8).model)[0]) <= 1e-5
