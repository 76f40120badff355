"""Laws of exports that bitsandbytes has quantized: its own bytes, and the model that was trained.

References: what transformers itself saves of bitsandbytes' layers; plain transformers and PEFT in a
process that cannot import this package; bitsandbytes' functions on blocks of one row each, because
on CPUs with AVX512 they are wrong for other widths (0.50).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from allocations import profiled_peak
from families import (
    QUANTIZED,
    refused,
    relative_error,
    save_checkpoint,
    save_quantized,
    save_tokenizer,
    token_ids,
)
from forked import Forks
from fp8_files import save_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import trained_base
from wrappers import save_wrapped

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError
from qlora_kit.export.bnb import bnb_notes
from qlora_kit.export.bnb_linears import BnbLinears
from qlora_kit.export.export import export_model, write_export
from qlora_kit.export.readers import verify_export
from qlora_kit.export.tensors import export_tensors
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.inject import activate

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama_bias", "nf4_double", {"bits": 4}),
    "gemma2": ("gemma2", "nf4", {"bits": 4, "double_quant": False}),
    "qwen3": ("qwen3", "fp4", {"bits": 4, "quant_type": "fp4", "double_quant": False}),
    "phi3": ("phi3", "int8", {"bits": 8}),
}
"""A family, how transformers is asked to quantize it, and how we are."""


def format_of(options: dict[str, Any]) -> str:
    return f"hf-{options['bits']}bit"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def trained(directory: Path, dtype: str = "bf16", **options: Any) -> Base:
    return trained_base(directory, dtype=dtype, device="cpu", **options)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=token_ids(2, 12), use_cache=False).logits.float()


def again(directory: Path, dtype: str = "bf16", bits: int | None = None) -> Any:
    """The model of an export with the adapter beside it, as this package reads both."""
    base = load_base(str(directory), bits=bits, dtype=dtype, device="cpu")
    return load_adapter(base, directory / "adapter").model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16 for every kind, under its name."""
    root = tmp_path_factory.mktemp("plain")
    for name, (family, _, _) in KINDS.items():
        save_checkpoint(root / name, family, torch.bfloat16)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_has_the_bytes_of_bitsandbytes_and_the_adapter_fits(
    plain: Path, tmp_path: Path, kind: str
) -> None:
    _, quantized, options = KINDS[kind]
    save_quantized(plain / kind, tmp_path / "theirs", **QUANTIZED[quantized])
    base = trained(plain / kind, **options)
    out = export_model(base, tmp_path / "out", format=format_of(options), shard_size=50_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert_same_bytes(out, tmp_path / "theirs")
    assert torch.equal(logits_of(again(out)), logits_of(base.model))
    assert json.loads((out / "export.json").read_text())["merge_base"] == "none"
    theirs, ours = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "theirs", out)
    )
    changed = {"llm_int8_skip_modules": ["lm_head"]}
    if base.quantization.bits == 4:
        changed["bnb_4bit_compute_dtype"] = "bfloat16"
    assert ours == theirs | changed
    # A checkpoint of bitsandbytes' goes through as it is, the adapter again beside it.
    stored = trained(tmp_path / "theirs")
    through = export_model(stored, tmp_path / "through", format=format_of(options))
    assert_same_bytes(through, tmp_path / "theirs")


# Reads exports with plain transformers and PEFT; nothing of this package can be imported there.
# Of each folder: the base by its own forwards ("own", where all widths are whole blocks), the base
# by numbers that are dequantized here, and by PEFT with the adapter.
PLAIN_READER = """
import sys
import bitsandbytes as bnb, bitsandbytes.functional as F4
import torch, torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

def numbers(layer):
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None:
        return (weight.data * (layer.scales / 127).unsqueeze(1)).to(layer.asked)
    shape, blocks = state.shape, -(-state.shape.numel() // 64)
    data = F.pad(weight.data.view(-1), (0, blocks * 32 - weight.numel()))
    scales = state.absmax
    if state.nested:
        scales = F4.dequantize_blockwise(scales, state.state2) + state.offset
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        data.view(-1, 1), scales, 64, state.quant_type, (blocks, 64), layer.asked
    )
    return flat.view(-1)[: shape.numel()].view(shape)

*folders, ids, out = sys.argv[1:]
ids, logits = load_file(ids)["ids"], {}
for number, folder in enumerate(folders):
    folder, _, attention = folder.rpartition("=")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    assert layers
    def run(kind, model=model):
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
        logits[f"{number} {kind}"] = found.float().contiguous()
    for layer in layers:
        # Its forward in evaluation would repack the weight in place on some CPUs.
        layer.support_avx512bf16_for_cpu = False
        layer.asked, layer.scales = model.dtype, getattr(layer.weight, "SCB", None)
    if all(layer.in_features % 64 == 0 for layer in layers):
        run("own")
    for layer in layers:
        layer.forward = lambda x, layer=layer: F.linear(x, numbers(layer), layer.bias)
    run("numbers")
    run("adapter", PeftModel.from_pretrained(model, folder, subfolder="adapter").eval())
save_file(logits, out)
"""


def read_plainly(without_us: Forks, folders: list[str], scratch: Path) -> list[dict[str, Tensor]]:
    """What the reader gives for each export, by kind."""
    save_file({"ids": token_ids(2, 12)}, scratch / "ids")
    paths = (str(scratch / name) for name in ("ids", "logits"))
    done = without_us.run(scratch, PLAIN_READER, *folders, *paths)
    assert done.code == 0, done.err
    found: list[dict[str, Tensor]] = [{} for _ in folders]
    for name, logits in load_file(scratch / "logits").items():
        number, kind = name.split(" ")
        found[int(number)][kind] = logits
    return found


def test_plain_transformers_and_peft_read_what_was_trained(
    without_us: Forks, tmp_path: Path
) -> None:
    bases, folders = [], []
    for kind, (family, _, options) in KINDS.items():
        width = {"intermediate_size": 192} if kind in ("llama", "phi3") else {}
        save_checkpoint(tmp_path / kind, family, torch.float32, **width)
        more: dict[str, Any] = {}
        if kind == "llama":  # more tokens than rows
            save_tokenizer(tmp_path / kind, extra=20)
            more = {"resize_embeddings": True}
        elif kind == "qwen3":
            more = {"skip_modules": ("layers.1.mlp", "k_proj")}
        bases.append(trained(tmp_path / kind, "fp32", **options, **more))
        out = export_model(bases[-1], tmp_path / f"{kind} out", format=format_of(options))
        folders.append(f"{out}={bases[-1].model.config._attn_implementation}")
    for base, found in zip(bases, read_plainly(without_us, folders, tmp_path), strict=True):
        with_adapter = logits_of(base.model)
        activate(base.model, None)
        alone = logits_of(base.model)
        assert torch.equal(found["numbers"], alone)
        # PEFT adds up in another order: some units in the last place of fp32.
        assert relative_error(found["adapter"], with_adapter) <= 2e-6
        assert relative_error(with_adapter, alone) > 1e-2
        if "own" in found and base.quantization.bits == 4:
            assert torch.equal(found["own"], alone)
        elif "own" in found:
            # LLM.int8 rounds the tokens to 8 bits as well, which training does not.
            assert relative_error(found["own"], alone) <= 0.1


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_merge_is_quantized_from_its_sum_and_the_rest_stays(
    plain: Path, tmp_path: Path, kind: str
) -> None:
    options = KINDS[kind][2]
    adapted = "q_proj" if kind == "llama" else "qkv_proj"
    lora = LoRAConfig(r=4, alpha=8, target_modules=(adapted,))
    base = trained(plain / kind, lora=lora, **options)
    for merge_base in ("dequantized", "original"):
        out = tmp_path / merge_base
        export_model(base, out, format=format_of(options), merge_base=merge_base)
        assert not (out / "adapter").exists()
        found = tensors_of(out)
        for one in export_tensors(base, merge_base=merge_base):
            if one.linear is not None and one.linear.endswith(adapted):
                assert one.make().dtype == torch.float32
                assert_quantized(found, one.linear, one.make(), options["bits"])
    unmerged = tensors_of(export_model(base, tmp_path / "none", format=format_of(options)))
    merged = tensors_of(tmp_path / "dequantized")
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, unmerged[name])}
    assert moved
    assert all(f".{adapted}." in name for name in moved)


def test_a_merge_on_files_that_were_quantized_in_another_dtype_is_one_checkpoint(
    plain: Path, tmp_path: Path
) -> None:
    """Each linear says what it was quantized from; where they differ nobody here reads it."""
    save_quantized(plain / "llama", tmp_path / "stored", **QUANTIZED["nf4"])
    lora = LoRAConfig(r=4, alpha=8, target_modules=("q_proj",))
    base = trained(tmp_path / "stored", dtype="fp32", lora=lora)
    out = export_model(base, tmp_path / "out", format="hf-4bit", merge_base="dequantized")
    found, before = tensors_of(out), tensors_of(tmp_path / "stored")
    kept = [name for name in found if name.endswith("v_proj.weight")]
    assert all(torch.equal(found[name], before[name]) for name in kept)
    read = load_base(str(out), dtype="fp32", device="cpu").model
    # The update is quantized anew.
    assert relative_error(logits_of(read), logits_of(base.model)) < 0.1


def assert_quantized(found: dict[str, Tensor], name: str, weight: Tensor, bits: int) -> None:
    """The tensors of a linear are those that bitsandbytes makes of a weight in fp32."""
    if bits == 8:
        rows, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        assert torch.equal(found[f"{name}.weight"], rows)
        assert torch.equal(found[f"{name}.SCB"], scales)
        return
    # As rows of one block, with zeros at the end, which change no block's largest value.
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    packed, state = bnb.quantize_4bit(flat, quant_type="nf4", compress_statistics=True)
    count = -(-weight.numel() // 2)
    assert torch.equal(found[f"{name}.weight"], packed[:count])
    assert torch.equal(found[f"{name}.weight.absmax"], state.absmax)
    assert torch.equal(found[f"{name}.weight.nested_absmax"], state.state2.absmax)


def test_other_bits_than_the_run_quantize_what_it_multiplied_by(
    plain: Path, tmp_path: Path
) -> None:
    save_quantized(plain / "llama", tmp_path / "theirs", **QUANTIZED["nf4_double"])
    whole = trained(plain / "llama", bits=16)
    out = export_model(whole, tmp_path / "4", format="hf-4bit")
    assert_same_bytes(out, tmp_path / "theirs")
    assert relative_error(logits_of(again(out)), logits_of(whole.model)) > 0.1
    four = trained(plain / "llama", bits=4)
    out = export_model(four, tmp_path / "8", format="hf-8bit")
    # 8 bits hold 16 values of a block to half a per cent.
    assert 1e-3 < relative_error(logits_of(again(out)), logits_of(four.model)) < 3e-2


def test_what_moves_weights_is_said(plain: Path) -> None:
    base = trained(plain / "llama", bits=4)

    def said(format: str, merge_base: str) -> tuple[str, str]:
        options = ExportConfig(output_dir="o", format=format, merge_base=merge_base)
        return " ".join(bnb_notes(base, options)), options.closer

    notes, closer = said("hf-4bit", "dequantized")
    assert "quantized again" in notes
    assert "--merge_base none" in closer
    notes, closer = said("hf-8bit", "none")
    assert "trained on 4 bits, and its base is quantized to 8" in notes
    assert "bits of the training run" in closer
    notes, _ = said("hf-4bit", "none")
    assert "quantized" not in notes
    assert "as of down_proj (173)" in notes  # which bitsandbytes reads wrongly on some CPUs


def test_an_export_without_a_quantized_linear_is_refused(plain: Path, tmp_path: Path) -> None:
    base = trained(plain / "llama", bits=4, skip_modules=".*")
    with refused(ConfigError, "hf-8bit: no linear of llama would", directory=tmp_path):
        export_model(base, tmp_path / "out", format="hf-8bit")


def test_the_base_as_numbers_and_the_adapter_beside_it(plain: Path, tmp_path: Path) -> None:
    base = trained(plain / "llama", bits=4)
    out = export_model(base, tmp_path / "out", merge_base="none")
    assert torch.equal(logits_of(again(out, bits=16)), logits_of(base.model))
    alone = export_model(base, tmp_path / "alone", adapter=None)
    assert_same_bytes(out, alone)
    named = export_model(base, tmp_path / "out", merge_base="none", overwrite=True)
    described = json.loads((named / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(named)


def test_of_a_multimodal_checkpoint_the_text_model_is_written(tmp_path: Path) -> None:
    save_wrapped(tmp_path / "base", "gemma3")
    base = trained(tmp_path / "base", "fp32", bits=4)
    out = export_model(base, tmp_path / "out", format="hf-4bit")
    assert torch.equal(logits_of(again(out, "fp32")), logits_of(base.model))
    keys = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3_text"
    with refused(ConfigError, "with_towers True goes with format hf, not", directory=tmp_path):
        export_model(base, tmp_path / "whole", format="hf-4bit", with_towers=True)
    with refused(ConfigError, "with_towers goes with a merge", directory=tmp_path):
        export_model(base, tmp_path / "whole", merge_base="none", with_towers=True)


def test_8_bit_floats_leave_as_they_were_loaded(tmp_path: Path) -> None:
    save_fp8(tmp_path, "blocks")
    base = trained(tmp_path / "fp8", bits=4)
    out = export_model(base, tmp_path / "out", format="hf-4bit")
    assert torch.equal(logits_of(again(out)), logits_of(base.model))


@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_real_models_are_read_back_as_they_were(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """stories260K has rows of 172 numbers, of which bitsandbytes makes others on some CPUs."""
    directory = Path(name)
    if name != "tiny":
        directory = request.getfixturevalue("data_dir") / "models" / name
    base = trained(directory, "fp32", bits=4)
    rows = [Encoded(ids, ids) for ids in token_ids(3, 40).tolist()]
    found = {}
    for merge_base in ("none", "dequantized")[: 1 + (name == "tiny")]:
        options = ExportConfig(
            output_dir=str(tmp_path / merge_base), format="hf-4bit", merge_base=merge_base
        )

        def inspect(aside: Path, options: ExportConfig = options) -> None:
            found[options.merge_base] = verify_export(base, aside, rows)[0].kl

        write_export(base, options, inspect)
    assert found["none"] <= 1e-7  # fp32, in another order
    assert found.get("dequantized", 1.0) > 1e-4


def test_what_is_made_at_once_is_one_linear(tmp_path: Path) -> None:
    """Dequantized in 16 bits, then in fp32, and its update; quantizing takes part after part."""
    save_checkpoint(tmp_path, "llama2", torch.bfloat16, intermediate_size=6144, num_hidden_layers=1)
    base = trained(tmp_path, bits=4)
    linears, made = BnbLinears.of(base, 4), [t for t in export_tensors(base) if t.linear]
    largest = max(one.shape.numel() for one in made)

    def make_all() -> None:
        for one in made:
            linears.tensors(base, one, torch.bfloat16, unchanged=False)

    assert profiled_peak(make_all) <= 10 * largest + 4 * 4 * (64 + 6144) + 1024
