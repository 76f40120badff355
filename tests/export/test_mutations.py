"""Exports that are a little wrong, each in a way that is seen in the wild; all must be caught.

They are written right, changed on disk, and read back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from families import edit_weights, save_checkpoint, token_ids
from gguf_models import save_model
from trained import trained_base

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError, NumericError, QloraKitError
from qlora_kit.export import gguf as gguf_export
from qlora_kit.export import gguf_readers
from qlora_kit.export.export import write_export
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.transformers_reader import read_model
from qlora_kit.gguf import layout, rope
from qlora_kit.gguf.layout import Layout
from qlora_kit.gguf.vocabulary import TokenType, Vocabulary, vocabulary

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


FAR = r"as llama\.cpp reads it is .* nats a token from the model as trained, above --max_kl"

HF: dict[str, tuple[Callable[[Path], None], type[QloraKitError], str]] = {
    "swapped layers": (
        lambda directory: edit_weights(directory, swap_layers),
        NumericError,
        "as transformers reads it is .* nats",
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


def unturned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Layout, "rows", lambda self, module, tensor: tensor)


def without_ones(patch: pytest.MonkeyPatch) -> None:
    real = layout.gguf_facts
    patch.setattr(layout, "gguf_facts", lambda kind: replace(real(kind), norm_offset=0.0))


def wrong_factors(patch: pytest.MonkeyPatch) -> None:
    real = rope._slower
    patch.setattr(rope, "_slower", lambda *said: torch.ones_like(real(*said)))


def crossed_layers(patch: pytest.MonkeyPatch) -> None:
    real, other = Layout.name, {"blk.0": "blk.1", "blk.1": "blk.0"}

    def name(self: Layout, module: str) -> str:
        found = real(self, module)
        return other.get(found[:5], found[:5]) + found[5:]

    patch.setattr(Layout, "name", name)


def changed_words(change: Callable[[Vocabulary], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def change_it(patch: pytest.MonkeyPatch) -> None:
        def changed(*given: Any) -> Vocabulary:
            found = copy.deepcopy(vocabulary(*given))
            change(found)
            return found

        patch.setattr(gguf_export, "vocabulary", changed)

    return change_it


def truncated(words: Vocabulary) -> None:
    last = max(n for n, kind in enumerate(words.types) if kind is TokenType.NORMAL)
    words.tokens[last], words.types[last] = f"[PAD{last}]", TokenType.UNUSED


def endless(words: Vocabulary) -> None:
    del words.ids["eot_token_id"]


GGUF: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], type[QloraKitError], str]] = {
    "q and k not permuted": ("llama2", unturned, NumericError, FAR),
    "Gemma's 1 forgotten": ("gemma3", without_ones, NumericError, FAR),
    "wrong rope factor": ("llama3", wrong_factors, NumericError, FAR),
    "swapped layers": ("llama2", crossed_layers, NumericError, FAR),
    "truncated tokenizer": ("llama2", changed_words(truncated), ExportError, "token 260 is"),
    "missing end token": ("llama2", changed_words(endless), ExportError, "not end an answer at"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """A base of a family, whose right GGUF is the trained model."""
    made: dict[str, Base] = {}

    def base_of(family: str) -> Base:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            save_model(directory / "base", family)
            base = trained_base(directory / "base", bits=4, dtype="fp32", device="cpu")
            # llama.cpp knows </s> by its name, and this one not.
            base.model.generation_config.eos_token_id = [1, 2]
            found = verified(base, directory / "right", format="gguf")
            assert found["kl"] <= 1e-5
            assert found["readers"].keys() == {"llama.cpp", "transformers"}
            made[family] = base
        return made[family]

    return base_of


def other_base_of_rope(directory: Path) -> None:
    """A number that transformers does not take from the file."""
    (file,) = directory.glob("*.gguf")
    reader = gguf.GGUFReader(file, "r+")
    reader.fields["llama.rope.freq_base"].parts[-1][0] *= 7
    reader.data.flush()


SEEN_BY_TRANSFORMERS = [name for name in GGUF if name != "wrong rope factor"]
"""It takes no factors from a file, and what they are was to be written so."""


@pytest.mark.parametrize("mutation", [*SEEN_BY_TRANSFORMERS, "another base"])
def test_transformers_alone_finds_it_too(
    written: Callable[[str], Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutation: str,
) -> None:
    """Where llama.cpp is not installed. What transformers leaves of a file is compared by key."""
    after, wrong = other_base_of_rope, (ExportError, "llama.rope.freq_base is not what was written")
    family, change, error, said = GGUF.get(mutation, ("llama2", None, *wrong))
    base = written(family)
    monkeypatch.setattr(gguf_readers, "llama_library", lambda adapter: None)
    if change is not None:
        change(monkeypatch)
    with pytest.raises(error, match=said.replace(r"llama\.cpp", "transformers")):
        verified(base, tmp_path / "out", None if change else after, format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mutation", GGUF)
def test_a_gguf_that_is_a_little_wrong_is_not_published(
    written: Callable[[str], Base],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutation: str,
) -> None:
    family, change, error, said = GGUF[mutation]
    base = written(family)
    change(monkeypatch)
    with pytest.raises(error, match=said):
        verified(base, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
