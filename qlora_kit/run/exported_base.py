"""A model that `export` wrote and that a command takes as a base: quantized, it is another one."""

from __future__ import annotations

from qlora_kit.base.base import Base
from qlora_kit.base.json_file import read_json
from qlora_kit.config.base import BaseConfig
from qlora_kit.errors import InputError
from qlora_kit.files.atomic import EXPORT_REPORT
from qlora_kit.options.parsed import Parsed


def quantized_again(parsed: Parsed, base: Base) -> str | None:
    """What to say of a plain export that nobody asked to quantize; None for any other base.

    Bits are those of training unless they are given, and a merged model has an update in it that
    they round away in part.
    """
    bits = base.quantization.bits
    if bits == 16 or "bits" in parsed.given[BaseConfig]:
        return None
    try:
        report = read_json(base.source.directory / EXPORT_REPORT)
    except (InputError, OSError):  # not there, or somebody else's: nothing depends on it
        return None
    if report.get("format") != "hf":
        return None
    return (
        f"{base.source.name} is a model that export wrote, and is quantized to {bits} bits here, "
        "which is another model than the one that was verified: --bits 16 takes it as it is"
    )
