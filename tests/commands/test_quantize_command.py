"""Laws of `qlora-kit quantize`: what transformers loads is what a run holds, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import token_ids
from transformers import AutoModelForCausalLM

from qlora_kit.base.bnb_tensors import hold_as_ours
from qlora_kit.base.load import load_base
from qlora_kit.device.target import processor_with

FORMS = {
    "nf4": (),
    "fp4_single": ("--quant_type", "fp4", "--no_double_quant"),
    "int8": ("--bits", 8),
}
OPTIONS = {
    "nf4": {},
    "fp4_single": {"quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_loads_is_what_a_run_holds(run, workshop, form):
    flags = ("--model", workshop.base, "--dtype", "bf16", "--skip_modules", "o_proj")
    done = run("quantize", *flags, *FORMS[form], "--verify", workshop.rows, "--output_dir", "out")
    assert done.code == 0, done.err
    assert "verified" in done.out
    held = {"dtype": "bf16", "device": "cpu"}
    ours = load_base(str(workshop.base), skip_modules="o_proj", **OPTIONS[form], **held).model
    back = load_base("./out", **held)  # which takes the form of the files
    tensors, again = ours.state_dict(), back.model.state_dict()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    theirs = AutoModelForCausalLM.from_pretrained("out", dtype="auto").eval()
    hold_as_ours(theirs)  # bitsandbytes' own matmuls are wrong for some widths
    # transformers multiplies in bf16 on any processor; so do we where it has instructions for it.
    with torch.no_grad(), processor_with(torch.bfloat16):
        logits = [
            one(input_ids=token_ids(), use_cache=False).logits for one in (theirs, back.model)
        ]
    assert torch.equal(*logits)
    report = json.loads((Path("out") / "export.json").read_text())
    assert report["format"] == ("hf-8bit" if form == "int8" else "hf-4bit")
    assert "adapter" not in report
    assert "# Quantized" in (Path("out") / "README.md").read_text()


def test_what_quantizes_nothing_is_refused_early(run, workshop):
    model = ("--model", workshop.base)
    refused = run("quantize", *model, "--bits", 16, "--output_dir", "out")
    assert (refused.code, refused.line) == (
        2,
        "error: bits 16 quantizes nothing; give --bits 4 or 8",
    )
    head = run("quantize", *model, "--head_bits", 4, "--output_dir", "out")
    assert (head.code, "head_bits 4: a checkpoint has" in head.line) == (2, True)
    assert "--output_dir not given" in run("quantize", *model).line
    assert run("quantize", *model, "--output_dir", "one", "--verify", workshop.rows).code == 0
    again = run("quantize", "--model", "./one", "--output_dir", "two")
    assert (again.code, "is quantized in its files already" in again.line) == (2, True)
    inside = run("quantize", *model, "--output_dir", workshop.base / "x")
    assert (inside.code, "overlaps with" in inside.line) == (2, True)
    taken = run("quantize", *model, "--output_dir", "one")
    assert (taken.code, "is not empty" in taken.line) == (2, True)
    assert not Path("out").exists()
    assert not Path("two").exists()
