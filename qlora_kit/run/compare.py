"""Every form in which a trained model could leave, measured side by side.

Each candidate is written to a folder that nobody sees, read back, compared with the model as
trained, and removed before the next one is made: the disk holds one at a time. What cannot be
written here (a format without its extra, a family that it does not know, a disk without the room)
is listed with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.base.base import Base
from qlora_kit.config.export import MERGED, QUANTIZED, ExportConfig
from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import QloraKitError
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.tensors import dtype_of
from qlora_kit.files.aside import folder_beside
from qlora_kit.files.atomic import check_room
from qlora_kit.gguf.tensor_types import KINDS
from qlora_kit.lora.inject import ADAPTER

FORMS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "hf": ({"merge_base": "dequantized"}, {"merge_base": "original"}),
    "gguf": (*({"export_dtype": name} for name in KINDS), {"quantize": "Q4_K_M"}),
    **dict.fromkeys(QUANTIZED, ({"merge_base": "none"}, {"merge_base": "dequantized"})),
}
"""The forms of a format, each as options of the export; of a format that is not here, its own."""
DISTANCE = ("kl", "top1_agreement", "max_logit_difference", "tokens")


def compare(
    base: Base,
    target: Path | None,
    rows: Sequence[Encoded],
    on_compared: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """Measure each candidate on `rows`; for each its format, options, bytes and distance.

    One that cannot be made has `not_available`, the reason, in place of these. The folder is beside
    `target`, or where temporary files are. `on_compared` is called with each as it is known.
    """
    found = []
    with _folder(target) as folder:
        for name in MERGED:
            for form in FORMS.get(name, ({},)):
                found.append(_measured(base, {"format": name, **form}, rows, folder))
                on_compared(found[-1])
    return found


def _measured(
    base: Base, form: Mapping[str, Any], rows: Sequence[Encoded], folder: Path
) -> dict[str, Any]:
    directory = folder / "candidate"
    said = dict(form)
    try:
        options = ExportConfig(output_dir=str(directory), **form)
        format = FORMATS[options.format]
        check_room(folder, format.size(base, options), "a candidate of --compare")
        said |= {"merge_base": options.merged_into, "dtype": dtype_of(base, options)}
        directory.mkdir()
        format.write(base, ADAPTER, options, directory)
        format.companions(base, directory, False)
        written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        report = format.verify(base, options, directory, rows)
    except QloraKitError as error:
        return said | {"not_available": error.problem}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return said | {"bytes": written} | {name: report[name] for name in DISTANCE}


@contextlib.contextmanager
def _folder(target: Path | None) -> Iterator[Path]:
    """A folder beside `target`, gone when the block ends; the next export removes one of a kill."""
    held = None if target is None else _beside(target)
    if held is None:
        with tempfile.TemporaryDirectory(prefix="qlora-kit-compare-") as name:
            yield Path(name)
        return
    folder, handle = held
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _beside(target: Path) -> tuple[Path, int] | None:
    """A folder beside `target` and what holds it; None where none can be made."""
    place = target.resolve()
    while not place.parent.exists():  # they are made when the export is
        place = place.parent
    try:
        return folder_beside(place)
    except OSError:  # the target is a mount point, say
        return None
