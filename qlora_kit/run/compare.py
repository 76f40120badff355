"""Every form in which a trained model could leave, measured side by side.

Each candidate is written to a folder that nobody sees, read back, compared with the model as
trained, and removed before the next one is made: the disk holds one at a time. What cannot be
written here (a format without its extra, a family that it does not know, a disk or a memory without
the room) is listed with the reason.
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
from qlora_kit.device.found import empty_cache
from qlora_kit.errors import QloraKitError
from qlora_kit.export.export import fill
from qlora_kit.export.formats import FORMATS
from qlora_kit.export.tensors import dtype_of
from qlora_kit.files.aside import folder_beside
from qlora_kit.files.atomic import check_room, without_folders
from qlora_kit.gguf.tensor_types import KINDS
from qlora_kit.process.out_of_memory import is_out_of_memory

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
            for form in FORMS[name]:
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
        fill(base, options, directory)
        written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        report = format.verify(base, options, directory, rows)
        found = {reader: one.get("kl") or 0.0 for reader, one in report["readers"].items()}
        reader = max(found, key=lambda one: found[one], default=None)
        return said | {"bytes": written, "reader": reader} | {n: report[n] for n in DISTANCE}
    except QloraKitError as error:
        why = error.problem
    except OSError as error:
        why = error.strerror or str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = "memory ended while it was made or read"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    # Here, not above: the exception held the frames, and they the tensors.
    empty_cache()
    return said | {"not_available": without_folders(why, directory, folder, base.source.directory)}


@contextlib.contextmanager
def _folder(target: Path | None) -> Iterator[Path]:
    """A folder beside `target`, gone when the block ends; the next export removes one of a kill."""
    with contextlib.ExitStack() as held:
        folder = None if target is None else _beside(target.resolve(), held)
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="qlora-kit-compare-")
            folder = Path(held.enter_context(made))
        yield folder


def _beside(target: Path, held: contextlib.ExitStack) -> Path | None:
    """A folder beside `target` for as long as `held` is; None where none can be made.

    So are the folders above that are not there yet: where `target` will be is looked for what a
    kill left.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held.callback(_remove_empty, missing)
        folder, handle = folder_beside(target)
    except OSError:  # the target is a mount point, say
        return None
    held.callback(os.close, handle)
    held.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
