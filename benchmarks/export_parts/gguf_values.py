"""What of a GGUF type's distance are its numbers, and what its reader's way to multiply by them.

llama.cpp rounds the rows that it multiplies to a type that fits the weights': to bf16 for BF16, to
fp16 for F16, to blocks of Q8_0 for Q8_0 and Q4_0. So the numbers of a file are written once more as
F32, which it multiplies without rounding; and transformers, which multiplies the numbers of the
file in fp32, is made to round what goes into its linears as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from qlora_kit.base.base import Base
from qlora_kit.base.load import load_base
from qlora_kit.data.tokens import Encoded
from qlora_kit.export.gguf_readers import GgufReaders
from qlora_kit.export.transformers_reader import model_pieces, read_gguf
from qlora_kit.export.verify import compare
from qlora_kit.lora.adapter import load_adapter
from qlora_kit.run.saved_adapter import SavedAdapter
from qlora_kit.run.verification import verification_rows

ARCHITECTURE = gguf.Keys.General.ARCHITECTURE
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@dataclass(frozen=True)
class Trained:
    """A model as it was trained on NF4 in fp32, and the rows that its exports are verified on."""

    base: Base
    rows: Sequence[Encoded]

    @staticmethod
    def open(adapter: Path) -> Trained:
        """That of a run's directory."""
        saved = SavedAdapter.open(str(adapter))
        name = str(saved.files.config["base_model_name_or_path"])
        base = load_base(name, bits=4, dtype="fp32", device="cpu")
        load_adapter(base, adapter)
        return Trained(base, verification_rows(saved, None, base, print)[0])

    def parts(self, export: Path, kind: str) -> dict[str, dict[str, float | int]]:
        """Its distance from the numbers of an export's GGUF of a type, by each way to multiply."""
        (file,) = export.glob("*.gguf")
        same = file.with_name("values.gguf")
        write_in_f32(file, same)
        readers = GgufReaders(self.base, same, self.rows)
        model = read_gguf(file, self.base.model.config, torch.device("cpu"))
        with rounding(model, kind):
            rounded = compare(readers.ours, model_pieces(model, readers.ours.rows))
        exact = readers.by_llama_cpp().found
        same.unlink()
        return {
            "llama.cpp, the values in F32": exact.as_dict(),
            "transformers, rounding as llama.cpp": rounded.as_dict(),
        }


def write_in_f32(source: Path, target: Path) -> None:
    """The GGUF `source` with the same fields, and the numbers of its tensors in F32."""
    read = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, read.fields[ARCHITECTURE].contents())
    for name, field in read.fields.items():
        if name != ARCHITECTURE and not name.startswith("GGUF."):
            kinds = (field.types[0], field.types[-1] if len(field.types) > 1 else None)
            writer.add_key_value(name, field.contents(), *kinds)
    for one in read.tensors:
        numbers = gguf.quants.dequantize(one.data, one.tensor_type)
        writer.add_tensor(one.name, np.ascontiguousarray(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_blocks(rows: Tensor) -> Tensor:
    blocks = gguf.quants.quantize(rows.contiguous().numpy(), Q8_0)
    return torch.from_numpy(gguf.quants.dequantize(blocks, Q8_0)).view(rows.shape)


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "f16": lambda rows: rows.half().float(),
    "bf16": lambda rows: rows.bfloat16().float(),
    "q8_0": _in_blocks,
    "q4_0": _in_blocks,
}
"""What llama.cpp makes of the rows (..., in) that weights of a type are multiplied by."""


@contextmanager
def rounding(model: nn.Module, kind: str) -> Iterator[None]:
    """Inside, the linears of `model` get their rows as llama.cpp rounds them for a type.

    A width that is no multiple of 32 is F16 in files of blocks.
    """

    def rounded(linear: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        assert isinstance(linear, nn.Linear)
        blocks = ROUNDED[kind] is _in_blocks and linear.in_features % 32
        return ROUNDED["f16" if blocks else kind](given[0]), *given[1:]

    linears = [one for one in model.modules() if isinstance(one, nn.Linear)]
    hooks = [one.register_forward_pre_hook(rounded) for one in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
