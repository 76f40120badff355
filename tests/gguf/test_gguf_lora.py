"""An adapter in a GGUF is the adapter that was trained, wherever its scale was."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import save_checkpoint, token_ids
from gguf_models import save_model
from tokenizers import normalizers
from torch import Tensor
from trained import save_peft, save_trained, trained_base

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.export import LORA_FILE, ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError, ModelError, NumericError
from qlora_kit.export import gguf_lora_check
from qlora_kit.export.gguf_lora import (
    check_updates,
    distance,
    lora_notes,
    lora_size,
    write_lora,
)
from qlora_kit.export.gguf_lora_check import needs_base, run_on_base, verify_lora
from qlora_kit.export.llamacpp import llama_library
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.inject import lora_layers
from qlora_kit.lora.layer import Masters
from qlora_kit.lora.low_rank import delta_weight

ALPHA, R = 6, 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora") / "base"
    save_checkpoint(directory, "llama2", torch.float32, num_key_value_heads=2)
    return directory


def options(directory: Path, **more: Any) -> ExportConfig:
    return ExportConfig(output_dir=str(directory), format="gguf-lora", **more)


def written(base: Base, directory: Path, **more: Any) -> gguf.GGUFReader:
    directory.mkdir()
    write_lora(base, "default", options(directory, **more), directory)
    return gguf.GGUFReader(directory / LORA_FILE)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def update(reader: gguf.GGUFReader, name: str) -> Tensor:
    """What llama.cpp adds to a weight (rows in its order), as its source has it."""
    held = {one.name: one for one in reader.tensors}
    a, b = (held[f"{name}.weight.lora_{part}"] for part in "ab")
    a, b = (gguf.quants.dequantize(one.data, one.tensor_type).astype(np.float64) for one in (a, b))
    return torch.from_numpy(b @ a * (field(reader, "adapter.lora.alpha") / a.shape[0]))


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of neighbours (2i, 2i + 1) of each head as rows of halves (i, i + d/2)."""
    first, second = rows.reshape(heads, -1, 2, rows.shape[1]).unbind(2)
    return torch.cat([first, second], 1).reshape(rows.shape)


@pytest.mark.parametrize(
    ("lora", "alpha"),
    [
        ({"r": R, "alpha": ALPHA}, ALPHA),
        # llama.cpp divides by r alone.
        ({"r": R, "alpha": ALPHA, "use_rslora": True}, ALPHA * math.sqrt(R)),
        ({"r": 3, "alpha": 0.1, "use_rslora": True}, 0.1 * math.sqrt(3)),
    ],
)
def test_every_update_is_the_trained_one(
    saved: Path, tmp_path: Path, lora: dict[str, Any], alpha: float
) -> None:
    config = LoRAConfig(target_modules="all-linear", **lora)
    base = trained_base(saved, bits=4, dtype="fp32", lora=config)
    reader = written(base, tmp_path / "out")
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "adapter.lora.alpha") == pytest.approx(alpha, rel=1e-7)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
    for ours, theirs in names.items():
        place = "mlp" if ours == "down_proj" else "self_attn"
        layer = lora_layers(base.model)[f"model.layers.1.{place}.{ours}"]
        found = update(reader, f"blk.1.{theirs}")
        if heads := {"q_proj": 4, "k_proj": 2}.get(ours):
            assert not torch.allclose(found.float(), delta_weight(Masters("default").part(layer)))
            found = in_halves(found, heads)
        # fp32: the reference multiplies in it, and alpha is rounded to it.
        torch.testing.assert_close(
            found.float(), delta_weight(Masters("default").part(layer)), rtol=1e-5, atol=1e-7
        )
    assert len(reader.tensors) == 2 * len(lora_layers(base.model))
    # A and B themselves are the trained ones, to the last bit.
    held = {one.name: one.data for one in reader.tensors}
    a, b = layer.weights("default")
    assert torch.equal(torch.from_numpy(held["blk.1.ffn_down.weight.lora_a"].copy()), a)
    assert torch.equal(torch.from_numpy(held["blk.1.ffn_down.weight.lora_b"].copy()), b)
    assert check_updates(base, options(tmp_path / "out"), tmp_path / "out") < 1e-7


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_modules_are_folded_into_b(
    saved: Path, tmp_path: Path, use_rslora: bool
) -> None:
    patterns = {
        "rank_pattern": {"k_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 5.0, "k_proj": 7.0},
    }
    save_peft(
        saved, tmp_path / "adapter", r=R, use_rslora=use_rslora,
        target_modules=["q_proj", "k_proj", "v_proj"], **patterns,
    )  # fmt: skip
    base = load_adapter(load_base(str(saved), bits=16, dtype="fp32"), tmp_path / "adapter")
    reader = written(base, tmp_path / "out")
    of_most = 2 * R * (math.sqrt(R) if use_rslora else 1)
    assert field(reader, "adapter.lora.alpha") == pytest.approx(of_most, rel=1e-7)
    for name, layer in lora_layers(base.model).items():
        _, _, number, _, leaf = name.split(".")
        found = update(reader, f"blk.{number}.attn_{leaf[0]}")
        if leaf != "v_proj":
            found = in_halves(found, {"q_proj": 4, "k_proj": 2}[leaf])
        torch.testing.assert_close(
            found.float(), delta_weight(Masters("default").part(layer)), rtol=1e-5, atol=1e-7
        )
    assert check_updates(base, options(tmp_path / "out"), tmp_path / "out") < 1e-6


@pytest.mark.parametrize(
    ("dtype", "kind", "apart"),
    [("auto", "F32", 1e-7), ("fp32", "F32", 1e-7), ("f16", "F16", 5e-4), ("bf16", "BF16", 4e-3)],
)
def test_it_is_written_in_the_dtype_that_is_asked(
    saved: Path, tmp_path: Path, dtype: str, kind: str, apart: float
) -> None:
    base = trained_base(saved, bits=16, dtype="fp32")
    out = tmp_path / "out"
    reader = written(base, out, export_dtype=dtype)
    assert {one.tensor_type.name for one in reader.tensors} == {kind}
    # Each number is rounded once, by half a step of its dtype.
    found = check_updates(base, options(out, export_dtype=dtype), out)
    assert apart / 10 < found < apart or (kind == "F32" and found < apart)


def test_it_says_which_base_it_is_for(saved: Path, tmp_path: Path) -> None:
    base = trained_base(saved, bits=4, dtype="fp32")
    reader = written(base, tmp_path / "ours")
    assert field(reader, "general.base_model.0.name") == "base"
    assert str(saved).encode() not in (tmp_path / "ours" / LORA_FILE).read_bytes()
    reader = written(base, tmp_path / "theirs", base_name="owner/name")
    said = {
        key: field(reader, f"general.base_model.0.{key}")
        for key in ("name", "organization", "repo_url")
    }
    assert said == {
        "name": "name", "organization": "owner", "repo_url": "https://huggingface.co/owner/name"
    }  # fmt: skip
    assert base.info.fingerprint in field(reader, "qlora_kit.trained_on")


def test_it_needs_no_weight_of_the_base(saved: Path, tmp_path: Path) -> None:
    save_trained(saved, tmp_path / "adapter", bits=4, dtype="fp32")
    base = open_base(BaseConfig(str(saved), bits=4, dtype="fp32"))
    (saved / "model.safetensors").rename(tmp_path / "away")
    try:
        load_adapter(base, tmp_path / "adapter")
        written(base, tmp_path / "out")
    finally:
        (tmp_path / "away").rename(saved / "model.safetensors")
    assert base.model.device.type == "meta"
    assert check_updates(base, options(tmp_path / "out"), tmp_path / "out") < 1e-7


@pytest.mark.parametrize("wrong", ["scale", "row", "pair"])
def test_an_update_that_is_another_one_is_found(saved: Path, tmp_path: Path, wrong: str) -> None:
    base, out = trained_base(saved, bits=16, dtype="fp32"), tmp_path / "out"
    written(base, out)
    layers = lora_layers(base.model)
    layer = layers["model.layers.1.self_attn.q_proj"]
    if wrong == "scale":
        layer.scaling["default"] *= 1.00001
    if wrong == "row":
        weight = layer.lora_B["default"].weight.data
        weight[[0, 1]] = weight[[1, 0]]
    if wrong == "pair":
        layer.remove_adapter("default")
    with pytest.raises(ExportError if wrong == "pair" else NumericError, match=r"blk\.1\.attn_q"):
        check_updates(base, options(out), out)


@pytest.mark.parametrize("by", [0.0, 1e-9, 1e-4, 1.0])
def test_a_distance_is_that_of_the_whole_matrices(by: float) -> None:
    generator = torch.Generator().manual_seed(5)
    b, a, of_b, of_a = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((40, 3), (3, 50), (40, 3), (3, 50))
    )
    other_b, other_a = b + by * of_b, a + by * of_a
    expected = (other_b @ other_a - b @ a).norm() / (b @ a).norm()
    # The reference subtracts products that are rounded to 2^-53 of themselves.
    assert distance((other_b, other_a), (b, a)) == pytest.approx(float(expected), rel=1e-5)
    assert distance((b, a[:2]), (b, a)) == math.inf


def test_a_distance_makes_no_matrix_of_the_weight_s_size() -> None:
    """Which would be 2 TiB in fp64."""
    long = torch.ones(2**19, 1, dtype=torch.float64)
    assert distance((long, long.T * 1.5), (long, long.T)) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("olmo2", "'olmo2' is not written as GGUF"),
        # Its settings are none that llama.cpp has: the base would be another model there.
        ("gemma2", "llama.cpp has nothing for query_pre_attn_scalar 24"),
    ],
)
def test_a_base_that_llama_cpp_does_not_have_is_refused(
    tmp_path: Path, family: str, said: str
) -> None:
    save_checkpoint(tmp_path / "base", family, torch.float32)
    base = open_base(BaseConfig(str(tmp_path / "base"), bits=16, dtype="fp32"))
    with pytest.raises(ModelError, match=re.escape(said)):
        lora_size(base, options(tmp_path / "out"))


def test_a_window_that_llama_cpp_does_not_have_is_noted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "mistral", torch.float32)
    base = open_base(BaseConfig(str(tmp_path / "base"), bits=16, dtype="fp32"))
    (note,) = lora_notes(base, options(tmp_path / "out"))
    assert "sliding window" in note


def test_the_base_that_a_quantized_one_is_in_gguf_is_noted(saved: Path, tmp_path: Path) -> None:
    (note,) = lora_notes(open_base(BaseConfig(str(saved), bits=4, dtype="fp32")), options(tmp_path))
    assert note.startswith("the adapter is for the base's own values in 4 bits")
    plain = open_base(BaseConfig(str(saved), bits=16, dtype="fp32"))
    assert not lora_notes(plain, options(tmp_path))


def test_a_head_that_no_gguf_of_the_base_has_is_noted(saved: Path, tmp_path: Path) -> None:
    """Where it is the embedding's, and was trained on in other bits."""
    save_checkpoint(tmp_path / "tied", "qwen2", torch.float32)
    for directory, said in ((tmp_path / "tied", "a head in 4 bits: a GGUF of the"), (saved, "")):
        asked = BaseConfig(str(directory), bits=8, head_bits=4, dtype="fp32")
        _, *notes = lora_notes(open_base(asked), options(tmp_path / "out"))
        assert (len(notes), said in " ".join(notes)) == (bool(said), True)


def test_the_context_is_that_up_to_which_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    """Beyond it the model has other factors; the file of the whole model says the same."""
    save_model(tmp_path / "base", "phi4_mini")
    base = trained_base(tmp_path / "base", bits=16, dtype="fp32")
    written(base, tmp_path / "out")
    assert "num_ctx 256\n" in (tmp_path / "out" / "Modelfile").read_text()


needs_llama_cpp = pytest.mark.skipif(
    llama_library(adapter=True) is None, reason="needs xllamacpp, which runs adapters"
)
ROWS = [Encoded(ids, ids) for n in (9, 30) for ids in token_ids(1, n, seed=n).tolist()]


def of_family(family: str, directory: Path) -> Base:
    """A base in 4 bits with adapters on every linear, scaled as rsLoRA is."""
    save_model(directory, family)
    lora = LoRAConfig(r=R, alpha=ALPHA, target_modules="all-linear", use_rslora=True)
    return trained_base(directory, bits=4, dtype="fp32", device="cpu", lora=lora)


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "gemma3", "phi4_mini", "granite"])
def test_llama_cpp_gives_the_logits_of_the_model_as_trained(family: str, tmp_path: Path) -> None:
    base, out = of_family(family, tmp_path / "base"), tmp_path / "out"
    written(base, out)
    before = sorted(path.name for path in out.iterdir())
    found = verify_lora(base, options(out, max_kl=1e-5), out, ROWS)
    # fp32 against fp32; the adapter alone is 1e-2 and more.
    assert found["kl"] < 1e-6
    assert found["top1_agreement"] == 1
    assert found["readers"].keys() == {"llama.cpp"}
    assert sorted(path.name for path in out.iterdir()) == before  # the base is gone


@needs_llama_cpp
def test_rows_in_another_order_are_caught_by_llama_cpp(tmp_path: Path) -> None:
    """It need not be told the order, as what reads the updates back is."""
    base, out = of_family("llama2", tmp_path / "base"), tmp_path / "out"
    written(base, out)
    held = np.memmap(out / LORA_FILE, np.uint8, "r+")
    for one in gguf.GGUFReader(out / LORA_FILE).tensors:
        if one.name.endswith(("attn_q.weight.lora_b", "attn_k.weight.lora_b")):
            rows = in_halves(torch.from_numpy(one.data.copy()), 4).numpy().view(np.uint8).ravel()
            start = int(one.data_offset)
            held[start : start + rows.size] = rows
    held.flush()
    with pytest.raises(NumericError, match=r"attn_q\.weight: its update"):
        check_updates(base, options(out), out)
    with pytest.raises(NumericError, match=r"as llama\.cpp reads it is"):
        run_on_base(base, options(out, max_kl=1e-3), out, ROWS)


@needs_llama_cpp
def test_a_base_without_room_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "base"
    save_model(source, "llama2")
    opened = open_base(BaseConfig(str(source), bits=4, dtype="fp32"))
    assert needs_base(opened, options(tmp_path / "out"))
    monkeypatch.setattr(gguf_lora_check, "free_bytes", lambda device: 0)
    assert not needs_base(opened, options(tmp_path / "out"))
    save_trained(source, tmp_path / "adapter", bits=4, dtype="fp32")
    load_adapter(opened, tmp_path / "adapter")
    written(opened, tmp_path / "out")
    monkeypatch.undo()  # and there is room when it is read back
    found = verify_lora(opened, options(tmp_path / "out"), tmp_path / "out", ROWS)
    assert "no room for its base" in found["not_read_by"]["llama.cpp"]


def test_a_limit_needs_llama_cpp(saved: Path, tmp_path: Path) -> None:
    base, out = trained_base(saved, bits=16, dtype="fp32"), tmp_path / "out"
    written(base, out)
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # no GGUF says it
    found = verify_lora(base, options(out), out, ROWS)
    assert found["updates"] == 14
    assert found["kl"] is None
    assert found["not_read_by"].keys() == {"llama.cpp"}
    with pytest.raises(ExportError, match="nothing here reads the export"):
        verify_lora(base, options(out, max_kl=1.0), out, ROWS)
