"""Which linears are not quantized: by `--skip_modules`, by family, and by what a config.json lists.

What a user names has to be there. What a file lists is compared as text, never run as a regex, and
whatever it lists beyond the text model (towers, the head) is no concern of a decoder's linears.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.pattern import full_matches
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.safetensors_file import some
from qlora_kit.base.share import small_linears
from qlora_kit.device.target import dtype_name
from qlora_kit.errors import ConfigError

PREFIX = re.compile(r"((model|language_model|text_model)\.)*")
"""What stands before a decoder's layers, in one kind of checkpoint or another."""
LISTED_LIMIT = 10_000
"""Names of a list that are looked at."""


def listed_modules(listed: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that a list out of a config.json stands for, or a module around them.

    As transformers has it (`should_convert_module`), of texts: from the start up to a dot, or the
    end of the name.
    """
    texts = {PREFIX.sub("", one, count=1) for one in itertools.islice(listed, LISTED_LIMIT)} - {""}
    starts, ends = tuple(f"{text}." for text in texts), tuple(texts)
    short = ((name, PREFIX.sub("", name, count=1)) for name in names)
    return frozenset(
        name for name, text in short if f"{text}.".startswith(starts) or text.endswith(ends)
    )


def skipped_linears(
    linears: Sequence[str], skip_modules: str | tuple[str, ...] | None
) -> frozenset[str]:
    """Those of `linears` that `--skip_modules` names: all below a name, or those a regex matches.

    A name stands for a linear, for the end or the start of its name, or for a module on the way.
    Errors: `ConfigError` listing the linears where a name or the regex matches nothing.
    """
    if skip_modules is None:
        return frozenset()
    if isinstance(skip_modules, str):
        (matched,) = full_matches([skip_modules], linears)
        if not matched:
            raise _no_match(skip_modules, linears)
        return frozenset(matched)
    matches = {one: {name for name in linears if f".{one}." in f".{name}."} for one in skip_modules}
    unmatched = [one for one, names in matches.items() if not names]
    if unmatched:
        raise _no_match(", ".join(unmatched), linears)
    return frozenset().union(*matches.values())


def left_linears(
    quantization: Quantization, linears: Mapping[str, nn.Linear], model: PreTrainedModel
) -> tuple[frozenset[str], tuple[str, ...]]:
    """The linears that are not quantized here, by options and by family, and what is said of it."""
    asked = skipped_linears(list(linears), quantization.skip_modules)
    kept, small = frozenset[str](), frozenset[str]()
    if quantization.bits < 16:
        record = architecture_of(model.config.model_type)
        named = (name for name in linears if name.rpartition(".")[2] in record.unquantized)
        kept = frozenset(named) - asked
        small = frozenset() if record.known else small_linears(linears) - asked - kept
    reasons = (
        (asked, "by --skip_modules"),
        (kept, f"as in every {model.config.model_type}"),
        (small, "being small"),
    )
    notes = [f"{in_16_bits(linears, one, model.dtype)}, {why}" for one, why in reasons if one]
    return asked | kept | small, tuple(notes)


def in_16_bits(
    linears: Mapping[str, nn.Linear], skipped: frozenset[str], dtype: torch.dtype
) -> str:
    """Which linears are not quantized, with their bytes."""
    names = [name for name in linears if name in skipped]
    size = sum(linears[name].weight.numel() for name in names) * dtype.itemsize
    what = "linear stays" if len(names) == 1 else "linears stay"
    return f"{len(names)} {what} in {dtype_name(dtype)} ({size} bytes: {some(names)})"


def by_last_name(linears: Iterable[str]) -> str:
    """What linears are called in all layers, and how many there are of each."""
    counts = collections.Counter(name.rpartition(".")[2] for name in linears)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _no_match(asked: str, linears: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"skip_modules {asked[:100]!r} matches no linear that is quantized",
        f"those are {by_last_name(linears)}",
    )
