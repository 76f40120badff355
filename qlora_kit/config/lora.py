"""The adapters: rank, scale and place."""

from __future__ import annotations

import math
import re
import typing
from dataclasses import dataclass

from qlora_kit.config.base import DTYPES
from qlora_kit.options.checks import LARGEST_ALPHA, LARGEST_RANK, a_name, between, one_of
from qlora_kit.options.option import Options, option

NAME_LIMIT = 200
"""Characters of an adapter's name."""
ADAPTER_NAMES = f"printable, no . or .., without a slash, of at most {NAME_LIMIT} characters"
OTHER_BASE_HELP = "use the adapter on a base with other weights than it was trained on"


def is_name(name: object) -> bool:
    """Whether an adapter can be asked for by a name: a text of one line that is not too long."""
    plain = isinstance(name, str) and name.isprintable() and len(name) <= NAME_LIMIT
    return plain and str(name).strip() != ""


def is_model_name(name: str) -> bool:
    """Whether an adapter can be asked for under a name by the API, where it is part of a path."""
    return is_name(name) and "/" not in name and name not in (".", "..")


def is_adapter_name(name: object) -> bool:
    """Whether a name can be part of the names of an adapter's weights, which dots divide."""
    return is_name(name) and "." not in str(name)


def scaling_of(r: int, alpha: float, use_rslora: bool) -> float:
    """What the product B A of rank `r` is multiplied by."""
    return alpha / (math.sqrt(r) if use_rslora else r)


@dataclass(frozen=True)
class LoRAConfig(Options):
    """The adapters: rank, scale and place."""

    title: typing.ClassVar[str] = "adapters"

    r: int = option(16, "rank", flag="lora_r", check=between(1, LARGEST_RANK))
    alpha: float = option(
        32.0,
        "the update is scaled by alpha / r",
        flag="lora_alpha",
        check=between(0, LARGEST_ALPHA, open_low=True, tiny=1e-6),
    )
    dropout: float = option(
        0.0, "dropout before lora_A", flag="lora_dropout", check=between(0, 1, open_high=True)
    )
    target_modules: str | tuple[str, ...] = option(
        "auto",
        "auto (query and value projections), all-linear, comma-separated names, or a regex",
        check=lambda value: None if value else "auto, all-linear, names or a regex",
        metavar="NAMES",
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    adapter_dtype: str = option(
        "auto",
        "dtype that adapters are computed and saved in (auto: the compute dtype); masters are fp32",
        check=one_of("auto", *DTYPES),
    )
    adapter: str | None = option(
        None,
        "go on training this adapter, ours or PEFT's; rank, scale and targets are its own",
        check=a_name(),
        path=True,
        metavar="DIR",
    )
    adapter_fingerprint: str | None = option(
        None,
        "SHA-256 that the weights of --adapter must have; a run's config.yaml holds it",
        check=lambda value: None if re.fullmatch("[0-9a-f]{64}", value) else "64 hex digits",
        metavar="SHA256",
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    adapter_keys: str | None = option(
        None,
        "names in the files of an adapter of a multimodal checkpoint: wrapper, those of the "
        "multimodal class (for PEFT and servers that load it), or text, those of the text model",
        check=one_of("wrapper", "text"),
        shown_default="wrapper, where the checkpoint is multimodal",
    )

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return scaling_of(self.r, self.alpha, self.use_rslora)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.adapter is None:
            if self.adapter_fingerprint is not None:
                yield "adapter_fingerprint goes with adapter, which is not given"
            if self.allow_other_base:
                yield "allow_other_base goes with adapter, which is not given"
