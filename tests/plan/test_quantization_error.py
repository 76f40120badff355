"""Laws of the error of quantizing: that of the layers that a run loads, and their bytes."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from families import QUANTIZED, refused, save_checkpoint, save_quantized
from fp8_files import save_fp8

from qlora_kit.base.linear import dequantize
from qlora_kit.base.load import load_base
from qlora_kit.base.meta_model import decoder_linears
from qlora_kit.base.tagged import quantized_tensors
from qlora_kit.commands.main import main
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import ConfigError
from qlora_kit.plan import quantization_error
from qlora_kit.plan.quantization_error import quantization_errors


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("errors")
    save_checkpoint(root / "plain", "qwen2", torch.bfloat16)
    save_fp8(root / "floats", "blocks")
    return root


@pytest.mark.parametrize("at_once", [2**22, 100])
@pytest.mark.parametrize("directory", ["plain", "floats/fp8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"quant_type": "fp4", "double_quant": False}, {"bits": 8}, {"skip_modules": "o_proj"}],
    ids=str,
)
def test_it_is_the_error_of_the_layers_that_a_run_loads(
    files, monkeypatch, options, directory, at_once
):
    monkeypatch.setattr(quantization_error, "AT_ONCE", at_once)
    where = {"model": str(files / directory), "dtype": "bf16", "device": "cpu"}
    found = quantization_errors(BaseConfig(**where, **options))
    held = decoder_linears(load_base(**where, **options).model)
    numbers = decoder_linears(load_base(**where | {"dtype": "fp32"}, bits=16).model)
    skipped = {name for name in held if "o_proj" in name and "skip_modules" in options}
    assert {one.name for one in found.linears} == held.keys() - skipped
    for one in found.linears:
        whole = numbers[one.name].weight.double()
        away = dequantize(held[one.name], torch.bfloat16).double() - whole
        assert one.error == pytest.approx(float(away.norm() / whole.norm()), rel=1e-5)
        assert one.bytes_unquantized == 2 * whole.numel()
        tensors = quantized_tensors(held[one.name])
        assert one.bytes_quantized == sum(t.numel() * t.element_size() for t in tensors)
    errors = [one.error for one in found.linears]
    assert errors == sorted(errors, reverse=True)
    for kind in found.kinds:
        own = [one.error for one in found.linears if one.name.endswith(f".{kind.name}")]
        assert (kind.count, kind.median) == (len(own), statistics.median(own))
        assert kind.worst.error == max(own)


def test_skipping_the_worst_costs_what_it_says(files, capsys):
    where = ["plan", "--model", str(files / "plain"), "--device", "cpu", "--dtype", "bf16"]
    assert main([*where, "--json", "--quantization_error"]) == 0
    said = json.loads(capsys.readouterr().out)
    errors = said["quantization_error"]
    assert len(errors["linears"]) == 14
    for skip in errors["skip_modules"][-1:]:
        assert main([*where, "--json", "--skip_modules", ",".join(skip["names"])]) == 0
        changed = json.loads(capsys.readouterr().out)["bytes"]
        assert changed["weights"] - said["bytes"]["weights"] == skip["added_bytes"]
    assert main([*where, "--quantization_error"]) == 0
    shown = capsys.readouterr().out
    assert shown.index(errors["linears"][0]["name"]) < shown.index(errors["linears"][1]["name"])
    worst = ",".join(one["name"] for one in errors["linears"][:5])
    assert f"--skip_modules {worst} takes " in shown.replace("\n", "")
    assert "--skip_modules the 10 worst takes " in shown


def test_what_has_no_error_is_refused(files, tmp_path):
    with refused(ConfigError, "in 16 bits nothing is quantized", directory=files):
        quantization_errors(BaseConfig(str(files / "plain"), bits=16))
    config = files / "plain" / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    save_quantized(files / "plain", tmp_path / "nf4", **QUANTIZED["nf4"])
    for model in (tmp_path / "config.json", tmp_path / "nf4"):
        with refused(ConfigError, "has no weights, or has them quantized", directory=tmp_path):
            quantization_errors(BaseConfig(str(model)))
