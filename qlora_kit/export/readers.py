"""Exports read back from disk by readers that are not ours, each compared with what was trained.

Tokens come first: a reader that makes others of a text is refused whatever its logits are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qlora_kit.base.base import Base
from qlora_kit.config.export import ExportConfig
from qlora_kit.data.batch import padding_id
from qlora_kit.data.tokens import Encoded
from qlora_kit.device.found import empty_cache, free_bytes
from qlora_kit.errors import ExportError, ResourceError
from qlora_kit.export.read_back import Way, read_layers, ways, with_adapter
from qlora_kit.export.token_check import (
    OF_THE_WHOLE,
    REMEDY,
    check_ends,
    check_tokens,
    check_vocabulary,
    texts_of,
    vocabulary,
)
from qlora_kit.export.transformers_reader import (
    TRANSFORMERS,
    model_pieces,
    read_model,
    read_tokenizer,
)
from qlora_kit.export.verify import Decoded, Verification, check_distance, compare, decoded
from qlora_kit.process.out_of_memory import is_out_of_memory


@dataclass(frozen=True)
class Read:
    """What one reader found: its name, how it read, the distance, and of how many of the `texts`
    it makes the same tokens. `note` is what a user should know of it.
    """

    reader: str
    how: str
    found: Verification
    texts_equal: int
    texts: int
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For export.json."""
        texts = {"texts": self.texts, "texts_equal": self.texts_equal}
        note = {} if self.note is None else {"note": self.note}
        return self.found.as_dict() | texts | {"read": self.how} | note


def check_read(options: ExportConfig, absent: Mapping[str, str]) -> None:
    """Refuse a limit on the distance where no reader can measure it, `absent` with their reasons.

    Errors: `ExportError`.
    """
    if options.max_kl is not None:
        reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise ExportError(
            f"--max_kl {options.max_kl:g}: nothing here reads the export ({reasons})",
            "nothing was written; give one of them what it lacks, or leave out --max_kl",
        )


def report_of(
    reads: Sequence[Read], options: ExportConfig, absent: Mapping[str, str]
) -> dict[str, Any]:
    """What export.json says: each reader's distance, and at the top the largest one.

    Without readers there is none; why those that are `absent` are is said as well. Errors:
    `NumericError` where one is above the limit, `ExportError` where there is a limit and no reader.
    """
    if not reads:
        check_read(options, absent)
        return dict.fromkeys((one.name for one in fields(Verification)), None) | {
            "export_read": None
        }
    for one in reads:
        check_distance(one.found.kl, options.max_kl, options.closer, one.reader)
    worst = max(reads, key=lambda one: one.found.kl)
    readers = {one.reader: one.as_dict() for one in reads}
    return worst.found.as_dict() | {"export_read": worst.how, "readers": readers}


def verify_hf(
    base: Base, options: ExportConfig, directory: Path, rows: Sequence[Encoded]
) -> dict[str, Any]:
    """Read a directory of transformers' files back; what is said of it in export.json.

    Errors: `ExportError`, `NumericError` for a distance above the limit, `ResourceError`.
    """
    texts = texts_of(rows, base.tokenizer)
    alone = base.wrapper is not None and not options.with_towers
    check_tokenizer_files(base, directory, texts, OF_THE_WHOLE if alone else REMEDY)
    found, way = verify_export(base, directory, rows)
    reader = TRANSFORMERS if way.whole else "qlora_kit"
    return report_of([Read(reader, str(way), found, len(texts), len(texts))], options, {})


def check_tokenizer_files(
    base: Base, directory: Path, texts: Sequence[str], remedy: str = REMEDY
) -> None:
    """Compare the tokenizer that transformers finds in a directory, and the tokens to stop at.

    Errors: `ExportError`.
    """
    name, theirs = TRANSFORMERS, read_tokenizer(directory)
    check_vocabulary(name, vocabulary(base.tokenizer), vocabulary(theirs), remedy)

    def made(text: str) -> list[int]:
        return list(theirs(text)["input_ids"])

    check_tokens(name, base.tokenizer, made, texts, remedy)
    settings = GenerationConfig.from_pretrained(directory, local_files_only=True)
    said = settings.eos_token_id
    check_ends(name, base.model, base.tokenizer, [said] if isinstance(said, int) else said or ())


def verify_export(base: Base, directory: Path, rows: Sequence[Encoded]) -> tuple[Verification, Way]:
    """Compare the model that is read back from `directory` with that of `base` on some rows.

    transformers reads it where it fits whole. Also gives the way that the export was read.
    Errors: `ExportError`, `ResourceError` where no way has room.
    """
    said = ""
    empty_cache()  # of what the export was made with
    for way in ways(directory, base.device, free_bytes(base.device)):
        try:
            return _verified(base, directory, way, rows), way
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = f"{way}: {error}"
        # Here, not above: the exception held the frames, and they the tensors.
        empty_cache()
    raise ResourceError(
        f"out of memory while the export was compared with the model as trained ({said})",
        "nothing was written; give --verify FILE with a few short rows, or free memory of the host",
    )


def _verified(base: Base, directory: Path, way: Way, rows: Sequence[Encoded]) -> Verification:
    ours = trained(base, rows)
    if way.whole:
        model = with_adapter(read_model(directory, way.device), directory, way)
        return compare(ours, model_pieces(model, ours.rows))
    with read_layers(directory, way) as layered:
        theirs = decoded(layered, rows, padding_id(base.tokenizer))
        return compare(ours, theirs.pieces())


def trained(base: Base, rows: Sequence[Encoded]) -> Decoded:
    """The model as trained on what is compared of some rows."""
    return decoded(base.model, rows, padding_id(base.tokenizer))
