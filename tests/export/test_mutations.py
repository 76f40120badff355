"""Exports that are a little wrong, each in a way that is seen in the wild; all must be caught.

They are written right, changed on disk, and read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import edit_weights, save_checkpoint, token_ids
from trained import trained_base

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError, NumericError, QloraKitError
from qlora_kit.export.companions import write_companions
from qlora_kit.export.export import write_export
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.transformers_reader import read_model

ROWS = [Encoded(ids, ids) for n in (9, 17, 30) for ids in token_ids(1, n, seed=n).tolist()]
LIMIT = 1e-4
"""Nats a token: fp32 against fp32 is below 1e-6."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    save_checkpoint(directory, "llama2")
    return trained_base(directory, bits=4, dtype="fp32", device="cpu")


def verified(
    base: Base, target: Path, change: Callable[[Path], None] | None = None, **options: Any
) -> dict[str, Any]:
    """What is found of an export that was changed after it was written."""
    asked = ExportConfig(output_dir=str(target), max_kl=LIMIT, **options)
    found: dict[str, Any] = {}

    def inspect(directory: Path) -> None:
        write_companions(base, directory, False)
        if change is not None:
            change(directory)
        found.update(FORMATS[asked.format].verify(base, asked, directory, ROWS))

    write_export(base, asked, inspect)
    return found


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def edit(directory: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = directory / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_last_token(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    del words[max(words, key=words.__getitem__)]


def lose_end(settings: dict[str, Any]) -> None:
    del settings["eos_token_id"]


HF: dict[str, tuple[Callable[[Path], None], type[QloraKitError], str]] = {
    "swapped layers": (
        lambda directory: edit_weights(directory, swap_layers),
        NumericError,
        "as transformers reads it is .* nats a token from the model as trained, above --max_kl",
    ),
    "truncated tokenizer": (
        lambda directory: edit(directory, "tokenizer.json", drop_last_token),
        ExportError,
        "transformers has 259 tokens, training 260",
    ),
    "missing end token": (
        lambda directory: edit(directory, "generation_config.json", lose_end),
        ExportError,
        "transformers does not end an answer at </s>",
    ),
}


@pytest.mark.parametrize("mutation", HF)
def test_an_hf_export_that_is_a_little_wrong_is_not_published(
    base: Base, tmp_path: Path, mutation: str
) -> None:
    change, error, said = HF[mutation]
    with pytest.raises(error, match=said):
        verified(base, tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_transformers_does_not_find_is_no_random_one(
    base: Base, tmp_path: Path
) -> None:
    verified(base, tmp_path / "out")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norms.weight"] = tensors.pop("model.norm.weight")

    edit_weights(tmp_path / "out", rename)
    with pytest.raises(ExportError, match=r"with 1 missing keys: model\.norm\.weight"):
        read_model(tmp_path / "out", torch.device("cpu"))


def test_the_same_unchanged_is_the_trained_model(base: Base, tmp_path: Path) -> None:
    found = verified(base, tmp_path / "out")
    assert found["readers"].keys() == {"transformers"}
    assert found["kl"] <= 1e-6
    assert found["readers"]["transformers"]["texts_equal"] == 13
