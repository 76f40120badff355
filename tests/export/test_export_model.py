"""Laws of the export: the weights are computed apart, and plain transformers reads the files.

The references use safetensors, bitsandbytes' own quantizing and dequantizing, and transformers in
a process that cannot import this package.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from allocations import profiled_peak
from families import (
    edit_config,
    edit_weights,
    save_checkpoint,
    save_tokenizer,
    token_ids,
    tree_hash,
)
from forked import Forks
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import save_trained, trained_base
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_kit.base.base import Base
from qlora_kit.base.safetensors_file import SINGLE_FILE
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.errors import AdapterError, ConfigError, ExportError, NumericError
from qlora_kit.export.export import check_export, export_model
from qlora_kit.export.tensors import export_tensors
from qlora_kit.lora.adapter import save_adapter
from qlora_kit.lora.inject import lora_layers

HOLDINGS: dict[str, dict[str, Any]] = {
    "nf4 double": {"bits": 4},
    "fp4 single": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
    "16 bits": {"bits": 16},
}
SCALING = 6 / 4


def quantized_and_back(weight: Tensor, holding: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """A weight as training multiplied by it, through bitsandbytes' own functions."""
    weight = weight.to(dtype)
    if holding["bits"] == 16:
        return weight
    if holding["bits"] == 8:
        rows, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        # Not rounded: training multiplies by the rows, and scales what comes out.
        return bnb.int8_vectorwise_dequant(rows, scales)
    # As rows of one block: bitsandbytes 0.50 is wrong on the CPU for other widths, and zeros at
    # the end change no block's largest value.
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    packed, state = bnb.quantize_4bit(
        flat,
        blocksize=64,
        quant_type=holding.get("quant_type", "nf4"),
        compress_statistics=holding.get("double_quant", True),
    )
    back = bnb.dequantize_4bit(packed, state).to(dtype)
    return back.flatten()[: weight.numel()].view(weight.shape)


def merged_apart(
    base: Path, adapter: Path, holding: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor of the export in fp32, before it is rounded."""
    update = load_file(adapter / "adapter_model.safetensors")
    merged = {}
    for name, weight in load_file(base / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if "_proj.weight" not in name:
            merged[name] = weight.to(dtype).float()
            continue
        merged[name] = quantized_and_back(weight, holding, dtype).float()
        if f"{key}A.weight" in update:
            a, b = (update[f"{key}{part}.weight"].float() for part in "AB")
            merged[name] += SCALING * (b @ a)
    return merged


def rounding_steps(ours: Tensor, reference: Tensor) -> Tensor:
    """How many representable numbers lie between two tensors of 16 bits, entry by entry."""
    ordered = []
    for tensor in (ours, reference):
        bits = tensor.contiguous().view(torch.int16).int()
        # Sign and magnitude to one line of whole numbers.
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


@dataclass(frozen=True)
class Made:
    """A base's directory, an adapter, its export, and the base as trained."""

    base: Path
    adapter: Path
    export: Path
    trained: Base


@pytest.fixture(scope="module")
def all_made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One export for every way to hold the base; odd widths and biases included."""
    folder = tmp_path_factory.mktemp("merge")
    save_checkpoint(folder / "base", "llama_bias", torch.bfloat16)
    made = {}
    for name, options in HOLDINGS.items():
        adapter, export = folder / f"{name} adapter", folder / f"{name} export"
        trained = save_trained(folder / "base", adapter, dtype="bf16", **options)
        export_model(trained, export)
        made[name] = Made(folder / "base", adapter, export, trained)
    return made


# Reads exports with plain transformers; nothing of this package can be imported there.
PLAIN_READER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
*folders, ids, out = sys.argv[1:]
ids = load_file(ids)["ids"]
logits = {}
for number, folder in enumerate(folders):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a b").input_ids
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits[str(number)] = model.eval()(ids).logits.float().contiguous()
save_file(logits, out)
"""


def read_plainly(
    without_us: Forks, folders: list[Path], ids: Tensor, scratch: Path
) -> list[Tensor]:
    """The logits that plain transformers gives for each export, (B, T, V)."""
    save_file({"ids": ids}, scratch / "ids.safetensors")
    arguments = [*map(str, folders), str(scratch / "ids.safetensors"), str(scratch / "logits")]
    done = without_us.run(scratch, PLAIN_READER, *arguments)
    assert done.code == 0, done.err
    logits = load_file(scratch / "logits")
    return [logits[str(number)] for number in range(len(folders))]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def distance(ours: Tensor, reference: Tensor) -> float:
    """Relative to the size of the reference, over all entries."""
    return float((ours - reference).norm() / reference.norm())


def kl(reference: Tensor, ours: Tensor) -> float:
    p, q = reference.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_same_model(made: Made, plain: Tensor, ids: Tensor, noise_free: Tensor) -> None:
    """The export against the model as trained, and against the noise of bf16 itself."""
    trained = logits_of(made.trained.model, ids)
    assert kl(trained, plain) <= 1e-3
    assert distance(plain, trained) <= 3e-2

    agreement = (plain.argmax(-1) == trained.argmax(-1)).float().mean()
    assert agreement >= 0.95
    assert distance(plain, trained) <= 2 * distance(trained, noise_free)


def in_fp32(base: Path, weights: dict[str, Tensor]) -> Any:
    """transformers' model of a base with these weights, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert not surplus
    assert not [name for name in missing if name != "lm_head.weight"]
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", HOLDINGS)
def test_weights_are_the_merge_computed_apart_and_rounded_once(
    all_made: dict[str, Made], name: str
) -> None:
    made = all_made[name]
    expected = merged_apart(made.base, made.adapter, HOLDINGS[name], torch.bfloat16)
    found = load_file(made.export / "model.safetensors")
    assert found.keys() == expected.keys()
    different = total = 0
    for key, reference in expected.items():
        steps = rounding_steps(found[key], reference.bfloat16())
        assert found[key].dtype == torch.bfloat16
        assert int(steps.max()) <= 1, key
        different += int((steps > 0).sum())
        total += steps.numel()
    assert different <= 1e-3 * total


def test_the_adapter_is_really_in_the_export(all_made: dict[str, Made]) -> None:
    made = all_made["nf4 double"]
    found = load_file(made.export / "model.safetensors")
    holding = HOLDINGS["nf4 double"]
    without = {
        key: quantized_and_back(weight, holding, torch.bfloat16) if "_proj" in key else weight
        for key, weight in load_file(made.base / "model.safetensors").items()
        if key.endswith("weight")
    }
    moved = [key for key in without if distance(found[key].float(), without[key].float()) > 0.01]
    assert len(moved) == 14  # seven linears in each of two layers


def test_plain_transformers_reads_what_was_trained(
    without_us: Forks, all_made: dict[str, Made], tmp_path: Path
) -> None:
    ids = token_ids(3, 40)
    plain = read_plainly(without_us, [made.export for made in all_made.values()], ids, tmp_path)
    for (name, made), logits in zip(all_made.items(), plain, strict=True):
        weights = merged_apart(made.base, made.adapter, HOLDINGS[name], torch.bfloat16)
        check_same_model(made, logits, ids, logits_of(in_fp32(made.base, weights), ids))


def test_a_real_model_that_was_trained_is_read_as_it_was(
    without_us: Forks, data_dir: Path, tmp_path: Path
) -> None:
    base = data_dir / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def rows(file: str, count: int) -> Tensor:
        lines = (data_dir / "text" / "wikisql" / file).read_text().splitlines()[:count]
        texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
        return torch.tensor([tokenizer(text).input_ids[:48] for text in texts])

    training, ids = rows("train.jsonl", 128).split(8), rows("valid.jsonl", 16)
    made = []
    for name in ("nf4 double", "int8"):
        trained = trained_base(base, spread=0.0, dtype="bf16", **HOLDINGS[name])
        model = trained.model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for batch in training:
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        save_adapter(trained, tmp_path / f"{name} adapter")
        export = export_model(trained, tmp_path / f"{name} export")
        made.append(Made(base, tmp_path / f"{name} adapter", export, trained))
    plain = read_plainly(without_us, [one.export for one in made], ids, tmp_path)
    for one, name, logits in zip(made, ("nf4 double", "int8"), plain, strict=True):
        weights = merged_apart(base, one.adapter, HOLDINGS[name], torch.bfloat16)
        check_same_model(one, logits, ids, logits_of(in_fp32(base, weights), ids))


@pytest.mark.parametrize("family", ["llama3", "gemma2", "phi3"])
def test_tied_heads_soft_caps_and_fused_linears_survive(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "base", family, torch.bfloat16)
    trained = save_trained(tmp_path / "base", tmp_path / "adapter", dtype="bf16")
    export_model(trained, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    held = load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == held.keys()  # a tied head is not written a second time
    assert ("lm_head.weight" in found) == (family == "phi3")
    ids = token_ids(2, 12)  # below the short rope's end, where both agree on the table
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, attn_implementation="eager"
    )
    ours = logits_of(trained.model, ids)
    assert kl(ours, logits_of(reference, ids)) <= 1e-3


def test_the_merge_into_8_bits_is_rounded_once(all_made: dict[str, Made]) -> None:
    """Against double precision: fp32 rounds three times, and bf16 differs next to ties alone."""
    trained = all_made["int8"].trained
    layers, found = lora_layers(trained.model), load_file(all_made["int8"].export / SINGLE_FILE)
    made = {one.name: one.make() for one in export_tensors(trained)}
    for name, layer in layers.items():
        rows, scales = layer.base_layer.weight, layer.base_layer.row_absmax
        a, b = (w.detach().bfloat16().double() for w in layer.weights("default"))
        held, update = rows.double() * scales.double()[:, None] / 127, SCALING * (b @ a)
        exact = held + update
        ours = made[f"{name}.weight"]
        assert ours.dtype == torch.float32
        assert distance(ours.double(), exact) <= 1e-6
        rounded = found[f"{name}.weight"].double()
        step = 2.0 ** (exact.abs().log2().floor() - 7)  # between neighbours in bf16
        slack = 1e-6 * (held.abs() + update.abs())
        assert bool(((rounded - exact).abs() <= step / 2 + slack).all())


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_another_dtype_rounds_the_same_sum(
    all_made: dict[str, Made], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    made = all_made["nf4 double"]
    export_model(made.trained, tmp_path / "out", dtype=name)
    expected = merged_apart(made.base, made.adapter, HOLDINGS["nf4 double"], torch.bfloat16)
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == dtype
        # The order in which fp32 sums B A is the only freedom: some units in its last place.
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(tensor.float(), expected[key], rtol=tolerance, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")


def test_the_original_base_is_another_merge(all_made: dict[str, Made], tmp_path: Path) -> None:
    made = all_made["nf4 double"]
    export_model(made.trained, tmp_path / "out", merge_base="original")
    expected = merged_apart(made.base, made.adapter, {"bits": 16}, torch.bfloat16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in found.items():
        assert int(rounding_steps(tensor, expected[key].bfloat16()).max()) <= 1
    dequantized = load_file(made.export / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert distance(found[key].float(), dequantized[key].float()) > 0.05


def test_a_base_that_holds_quantized_weights_only_has_no_original(
    all_made: dict[str, Made], tmp_path: Path
) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(
        all_made["int8"].base,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    quantized.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    trained = trained_base(tmp_path / "base", bits=4, double_quant=False, dtype="bf16")
    before = tree_hash(tmp_path)
    said = r"--merge_base original: the base holds .* quantized"
    with pytest.raises(ConfigError, match=said):
        export_model(trained, tmp_path / "out", merge_base="original")
    # So it is when nothing is loaded yet.
    for form in ("hf", "hf-4bit", "hf-8bit"):
        options = ExportConfig(format=form, merge_base="original")
        with pytest.raises(ConfigError, match=said):
            check_export(trained, tmp_path / "out", options)
    assert tree_hash(tmp_path) == before
    export_model(trained, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_base_alone_is_exported_without_an_adapter(
    all_made: dict[str, Made], tmp_path: Path
) -> None:
    made = all_made["16 bits"]
    export_model(made.trained, tmp_path / "out", adapter=None)
    held = load_file(made.base / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == held.keys()
    assert all(torch.equal(found[key], held[key]) for key in held)


def test_shards_hold_the_same_tensors(all_made: dict[str, Made], tmp_path: Path) -> None:
    made = all_made["nf4 double"]
    whole = load_file(made.export / "model.safetensors")
    limit = 50_000
    export_model(made.trained, tmp_path / "out", shard_size=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    found = {}
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][key] == file for key in shard)
        size = sum(tensor.nbytes for tensor in shard.values())
        assert size <= limit or len(shard) == 1
        found |= shard
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    single = AutoModelForCausalLM.from_pretrained(made.export, dtype=torch.bfloat16)
    ids = token_ids()
    assert torch.equal(logits_of(model, ids), logits_of(single, ids))


def test_what_is_made_on_the_device_is_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Dequantized in 16 bits, then in fp32, and its update: ten bytes an element."""
    save_checkpoint(tmp_path, "llama2", torch.bfloat16, intermediate_size=1536)
    base = trained_base(tmp_path, bits=4, dtype="bf16")
    made = export_tensors(base)
    largest = max(tensor.shape.numel() for tensor in made)

    def size(pair: tuple[Tensor, Tensor]) -> int:
        return sum(matrix.numel() for matrix in pair)

    assert largest == 64 * 1536

    def make_all() -> None:
        for tensor in made:
            tensor.make()

    a, b = max((layer.weights("default") for layer in lora_layers(base.model).values()), key=size)
    assert profiled_peak(make_all) <= 10 * largest + 4 * size((a, b)) + 1024


def test_settings_and_tokenizer_go_along(all_made: dict[str, Made]) -> None:
    made = all_made["int8"]
    names = {path.name for path in made.base.iterdir()}
    assert {path.name for path in made.export.iterdir()} == names | {"export.json"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (made.export / name).read_bytes() == (made.base / name).read_bytes()
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (made.base, made.export)
    )
    assert before | {"dtype": "bfloat16"} == after


def test_an_old_config_keeps_its_own_word_for_the_dtype(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama2", torch.float32)
    edit_config(tmp_path / "base", dtype=None, torch_dtype="float32")
    trained = trained_base(tmp_path / "base", bits=4, dtype="bf16")
    export_model(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    assert "quantization_config" not in config


def test_a_model_without_that_adapter_is_refused(all_made: dict[str, Made], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        export_model(all_made["int8"].trained, tmp_path / "out", adapter="other")
    assert not any(tmp_path.iterdir())


def test_an_export_that_would_overflow_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama2", torch.float32)
    edit_weights(
        tmp_path / "base",
        lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(70000.0),
    )
    trained = trained_base(tmp_path / "base", bits=16, dtype="fp32")
    before = tree_hash(tmp_path)
    with pytest.raises(NumericError, match=r"layers\.0\.mlp\.up_proj\.weight .*not finite"):
        export_model(trained, tmp_path / "out", dtype="fp16")
    assert tree_hash(tmp_path) == before


def test_a_file_that_may_not_grow_leaves_what_was_there(
    all_made: dict[str, Made], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    before = tree_hash(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises((ExportError, OSError)) as caught:
            export_model(all_made["int8"].trained, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value)
    assert tree_hash(tmp_path) == before


def test_an_inspector_that_raises_keeps_it_from_appearing(
    all_made: dict[str, Made], tmp_path: Path
) -> None:
    seen = []

    def inspect(directory: Path) -> None:
        seen.append(sorted(path.name for path in directory.iterdir()))
        raise NumericError("too far", "look again")

    with pytest.raises(NumericError):
        export_model(all_made["int8"].trained, tmp_path / "out", inspect=inspect)
    assert "model.safetensors" in seen[0]
    assert not any(tmp_path.iterdir())


def test_the_base_is_not_written_over(all_made: dict[str, Made]) -> None:
    made = all_made["int8"]
    before = tree_hash(made.base)
    for target in (made.base, made.base / "out", made.base.parent):
        with pytest.raises(ConfigError, match="overlaps with"):
            export_model(made.trained, target, overwrite=True)
    assert tree_hash(made.base) == before


def test_one_adapter_of_two_targets_leaves_the_other_linears_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama2", torch.bfloat16)
    trained = trained_base(tmp_path / "base", bits=16, dtype="bf16", lora=LoRAConfig(r=4))
    export_model(trained, tmp_path / "out")
    held = load_file(tmp_path / "base" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {key.split(".")[-2] for key in held if not torch.equal(held[key], found[key])}
    assert changed == {"q_proj", "v_proj"}
