"""Laws of exports of multimodal checkpoints: the text model alone, or the whole with its towers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from any_model import save_random
from families import edit_weights, randomize_adapter, refused, relative_error, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from wrappers import FIRST, save_wrapped

from qlora_kit.base.load import load_base
from qlora_kit.base.text_decoder import is_tower
from qlora_kit.config.export import ExportConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ConfigError, ExportError
from qlora_kit.export.export import export_model, write_export
from qlora_kit.export.readers import verify_hf
from qlora_kit.export.transformers_reader import read_model
from qlora_kit.lora.inject import inject_lora

PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrapped")
    for name in FIRST:
        save_wrapped(root / name, name)
        (root / name / PROCESSOR).write_text('{"size": 16}\n')
    return root


def adapted(directory, bits=16):
    base = load_base(str(directory), bits=bits, dtype="fp32", device="cpu")
    inject_lora(base.model, LoRAConfig(r=4, alpha=8, target_modules="all-linear"))
    randomize_adapter(base.model)
    return base


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def tensors_of(directory):
    return {
        key: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(("name", "bits"), [*((name, 16) for name in FIRST), ("mistral3", 4)])
def test_both_exports_are_the_trained_model(checkpoints, tmp_path, name, bits):
    base = adapted(checkpoints / name, bits)
    trained = logits(base.model)
    export_model(base, tmp_path / "text", shard_size=30_000)
    export_model(base, tmp_path / "whole", with_towers=True, shard_size=30_000)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert type(text) is type(base.model)
    assert relative_error(logits(text), trained) <= 1e-5
    assert torch.equal(logits(whole), logits(text))
    # Towers have the very bytes, under the very names; the rest is what the files named.
    before, after = (
        load_file(checkpoints / name / "model.safetensors"),
        tensors_of(tmp_path / "whole"),
    )
    assert before.keys() == after.keys()
    for key in filter(is_tower, before):
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key])
    assert not any(map(is_tower, tensors_of(tmp_path / "text")))
    # What turns images into tokens goes along with the towers, and with them alone.
    assert (tmp_path / "whole" / PROCESSOR).read_text() == '{"size": 16}\n'
    assert not (tmp_path / "text" / PROCESSOR).exists()
    for directory in (tmp_path / "text", tmp_path / "whole"):
        again = load_base(str(directory), bits=16, dtype="fp32", device="cpu")
        assert torch.equal(logits(again.model), logits(text))


def test_towers_keep_their_dtype_in_another_export(checkpoints, tmp_path):
    base = adapted(checkpoints / "gemma3")
    export_model(base, tmp_path / "whole", with_towers=True, dtype="bf16")
    before, after = (
        load_file(checkpoints / "gemma3" / "model.safetensors"),
        tensors_of(tmp_path / "whole"),
    )
    for key, tensor in after.items():
        assert tensor.dtype == (torch.float32 if is_tower(key) else torch.bfloat16)
    assert all(torch.equal(before[key], after[key]) for key in before if is_tower(key))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["model_type"] == "gemma3"
    assert config["dtype"] == "bfloat16"
    # transformers has a class for the family, whatever the file says.
    del config["architectures"]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    read = read_model(tmp_path / "whole", torch.device("cpu"))
    assert type(read).__name__ == "Gemma3ForConditionalGeneration"


def test_text_models_whose_tokens_transformers_would_change_are_refused(tmp_path):
    """It takes its own class for any Qwen 2, whatever tokenizer_config.json says (5.23)."""
    save_random(tmp_path / "base", "got_ocr2")
    base = adapted(tmp_path / "base")
    rows = [Encoded(ids, ids) for ids in token_ids().tolist()]

    def write(name, **more):
        options = ExportConfig(output_dir=str(tmp_path / name), **more)
        write_export(base, options, lambda made: verify_hf(base, options, made, rows))

    with pytest.raises(ExportError, match="other tokens of a text") as caught:
        write("text")
    assert not (tmp_path / "text").exists()
    assert "--with_towers writes the whole" in caught.value.remedy
    write("whole", with_towers=True)


def test_towers_are_refused_where_they_cannot_stay(checkpoints, bases, tmp_path):
    plain = load_base(str(bases / "llama2"), bits=16, dtype="fp32", device="cpu")
    with refused(ConfigError, "llama2 has none", directory=tmp_path):
        export_model(plain, tmp_path / "out", adapter=None, with_towers=True)
    model = shutil.copytree(checkpoints / "gemma3", tmp_path / "model")
    name = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].to(torch.uint8)}))
    base = load_base(str(model), bits=16, dtype="fp32", device="cpu")
    with refused(ConfigError, f"{name} is quantized", directory=tmp_path):
        export_model(base, tmp_path / "out", adapter=None, with_towers=True)
