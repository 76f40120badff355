"""`save_pretrained` of a model of ours writes nothing that loads as another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import save_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import ExportError
from qlora_kit.lora.inject import inject_lora


@pytest.mark.parametrize(("bits", "injected"), [(4, False), (4, True), (8, True), (16, True)])
def test_saving_is_refused_with_what_to_do(tmp_path: Path, bits: int, injected: bool) -> None:
    base = load_base("tiny", bits=bits, device="cpu")
    if injected:
        inject_lora(base.model, LoRAConfig(r=2))
    with pytest.raises(ExportError, match="save_adapter") as refused:
        base.model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert "to_peft" in str(refused.value)
    assert not (tmp_path / "saved").exists()


def test_a_plain_base_is_saved_as_ever(tmp_path: Path) -> None:
    base = load_base("tiny", bits=16, device="cpu", dtype="fp32")
    base.model.save_pretrained(tmp_path)
    ids = torch.arange(3, 13).unsqueeze(0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, base.model(ids).logits)


def test_what_transformers_itself_would_write_is_another_model(tmp_path: Path) -> None:
    """Fails once transformers (5.23) refuses it: then ours need not."""
    save_checkpoint(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), bits=16, device="cpu", dtype="fp32")
    inject_lora(base.model, LoRAConfig(r=2, target_modules="all-linear"))
    PreTrainedModel.save_pretrained(base.model, tmp_path / "saved")
    transformers.logging.set_verbosity_error()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(3, 13).unsqueeze(0)
    ours, theirs = base.model(ids).logits, again.eval()(ids).logits
    assert (theirs - ours).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_trainer_refuses_a_quantized_model_before_it_trains(tmp_path: Path, bits: int) -> None:
    base = load_base("tiny", bits=bits, device="cpu")
    inject_lora(base.model, LoRAConfig(r=2))
    options = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=base.model, args=options)
