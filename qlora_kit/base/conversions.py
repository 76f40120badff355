"""Tensors of a checkpoint by the names that transformers' class of today has for them.

Published files have names of other times: `embed_out` for a head, or a decoder without what the
class around it calls it. transformers renames them while it loads; its table of plain renamings
(`conversion_mapping.py`) is read here, for families without a record. What makes tensors out of
other tensors is left out: such a checkpoint is refused by the names that do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.errors import ModelError


def by_model_names(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The `entries` of files by the names of `model`, without those that it computes by itself.

    A name that fits already stays, and so does one that no renaming makes fit.
    """
    found = dict(entries)
    expected = set(model.state_dict())
    if architecture_of(model.config.model_type).known or found.keys() <= expected:
        return found
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    rename = _renaming(model, expected)
    named: dict[str, TensorEntry] = {}
    for name, entry in found.items():
        if name not in expected and any(one.search(name) for one in ignored):
            continue
        ours = rename(name)
        # Two tensors that would have one name keep their own, so that both are shown.
        named[name if ours in found or ours in named else ours] = entry
    if expected - named.keys() and named.keys() - expected:
        _refuse_converted(model, named.keys() - expected)
    return named


def _refuse_converted(model: Any, names: Collection[str]) -> None:
    """Refuse `names` of tensors out of which transformers makes others. Errors: `ModelError`."""
    for one in get_model_conversion_mapping(model):
        if isinstance(one, WeightConverter):
            for source in one.source_patterns:
                pattern = re.compile(source.replace("*", r"\d+"))
                if found := next(filter(pattern.search, sorted(names)), None):
                    raise ModelError(
                        f"model_type {model.config.model_type!r}: transformers makes other tensors "
                        f"out of {found} while it loads (it splits or joins them), which is not "
                        "done here",
                        "use a model of another family",
                    )


def _renaming(model: Any, expected: set[str]) -> Callable[[str], str]:
    """What gives a name that `model` has for one that it has not, or that one itself."""
    pairs = [
        (re.compile(source), target.replace("\\.", "."))
        for one in get_model_conversion_mapping(model)
        if isinstance(one, WeightRenaming) and len(one.target_patterns) == 1
        for source, target in zip(one.source_patterns[:1], one.target_patterns, strict=True)
    ]
    prefix = f"{model.base_model_prefix}."

    def fits(name: str) -> bool:
        # A weight that is quantized has parts whose names go on.
        weight, dot, _ = name.partition(".weight")
        return name in expected or (bool(dot) and f"{weight}.weight" in expected)

    def rename(name: str) -> str:
        if fits(name):
            return name
        renamed = name
        for source, target in pairs:
            renamed = source.sub(target, renamed)
        for ours in (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix)):
            if fits(ours):
                return ours
        return name

    return rename
