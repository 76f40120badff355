"""A GGUF file: its bytes, its types, and that it is there whole or not at all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from qlora_kit.errors import NumericError
from qlora_kit.gguf import tensor_types
from qlora_kit.gguf.file import Fields, FileTensor, head_bytes, write_gguf_file
from qlora_kit.gguf.tensor_types import BLOCKS, FLOATS, encode, kind_of, nbytes

FIELDS: Fields = [
    ("general.name", "a name, ü"),
    ("llama.context_length", 2**31),
    ("llama.rope.freq_base", 1e6),
    ("tokenizer.ggml.add_bos_token", False),
    ("tokenizer.ggml.tokens", ["a", "ü", ""]),
    ("tokenizer.ggml.scores", [-1.0, 0.5, 2.0]),
    ("tokenizer.ggml.token_type", [1, 2, 3]),
]
SHAPES = {"a.weight": (3, 64), "b.weight": (5,), "c.weight": (7, 32)}


def tensors(kind: str, made: Callable[[str], None] = lambda name: None) -> list[FileTensor]:
    """Tensors of some numbers, with a call as each is made."""

    def make(name: str) -> Tensor:
        made(name)
        return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))

    return [
        FileTensor(name, shape, kind_of(shape, kind, False), lambda name=name: make(name))
        for name, shape in SHAPES.items()
    ]


@pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS])
def test_a_file_says_and_holds_what_it_was_given(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf_file(path, "llama", FIELDS, tensors(kind))
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    for key, value in FIELDS:
        assert reader.fields[key].contents() == value
    for one, given in zip(reader.tensors, tensors(kind), strict=True):
        number = given.make().numpy()
        assert one.name == given.name
        assert list(one.shape) == list(reversed(SHAPES[one.name]))
        assert one.tensor_type.name == ("F32" if number.ndim == 1 else kind)
        # The package's own functions, bit for bit.
        assert one.data.tobytes() == gguf.quants.quantize(number, one.tensor_type).tobytes()
        assert one.data.nbytes == given.nbytes
    size = path.stat().st_size
    foreseen = head_bytes(FIELDS, tensors(kind)) + sum(one.nbytes for one in tensors(kind))
    assert size <= foreseen <= size + 64 + 64 * len(SHAPES)


def test_the_same_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_gguf_file(tmp_path / name, "llama", FIELDS, tensors("Q8_0"))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make(name: str) -> Tensor:
        assert all(one() is None for one in alive)
        tensor = torch.ones(SHAPES[name])
        alive.append(weakref.ref(tensor))
        return tensor

    given = [
        FileTensor(name, shape, "F16", lambda name=name: make(name))
        for name, shape in SHAPES.items()
    ]
    write_gguf_file(tmp_path / "x", "llama", FIELDS, given)
    assert len(alive) == len(SHAPES)


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def broken(name: str) -> None:
        if name == "c.weight":
            raise NumericError("no", "nothing")

    with pytest.raises(NumericError):
        write_gguf_file(path, "llama", FIELDS, tensors("F16", broken))
    assert [one.name for one in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"old"


def test_types_by_shape() -> None:
    """What has one row is F32; rows of no whole blocks are F16; of 4 bits the head has 8."""
    assert {kind_of((64,), kind, False) for kind in (*FLOATS, *BLOCKS)} == {"F32"}
    assert [kind_of((3, 40), kind, False) for kind in BLOCKS] == ["F16", "F16"]
    assert kind_of((3, 64), "Q4_0", True) == "Q8_0"
    assert kind_of((3, 64), "Q4_0", False) == "Q4_0"
    assert kind_of((3, 64), "F16", True) == "F16"
    assert nbytes((3, 64), "Q8_0") == 3 * 2 * 34


@pytest.mark.parametrize(
    ("kind", "largest"), [("F16", 65504.0), ("Q8_0", 127 * 65504.0), ("Q4_0", 8 * 65504.0)]
)
def test_what_a_type_cannot_hold_is_refused(kind: str, largest: float) -> None:
    held = torch.zeros(2, 32)
    held[1, 3] = largest
    assert sum(part.nbytes for part in encode(held, kind, "a")) == nbytes((2, 32), kind)
    with pytest.raises(NumericError, match=r"^a.*1 (values|scales)"):
        list(encode(held * 1.01, kind, "a"))
    held[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"^a .*1 values that are not finite"):
        list(encode(held, kind, "a"))


@pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS])
def test_rows_at_a_time_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    (whole,) = encode(tensor, kind, "a")
    monkeypatch.setattr(tensor_types, "AT_ONCE", 128)
    parts = list(encode(tensor, kind, "a"))
    assert len(parts) == 4
    assert b"".join(part.tobytes() for part in parts) == whole.tobytes()
