"""Which linears are not quantized, and what else of a model stays in 16 bits.

Not quantized are those that `--skip_modules`, a family or a list in config.json names. Embeddings,
the output head and norms stay too, and so do convolutions, recurrences and linears that are small:
they take little, and 4 bits would hurt them most. A model whose large weights are none of these and
no linears either would be called quantized and mostly not be, so it is refused.

What a user names has to be there. What a file lists is compared as text, never run as a regex, and
whatever it lists beyond the text model (towers, the head) is no concern of a decoder's linears.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.pattern import full_matches
from qlora_kit.base.quantize import Quantization
from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import size_text

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
    notes = (not_quantized(linears, one, why) for one, why in reasons if one)
    return asked | kept | small, tuple(notes)


def not_quantized(linears: Iterable[str], skipped: frozenset[str], why: str) -> str:
    """Which linears are not quantized, and why; `Share` says their dtype and bytes."""
    names = [name for name in linears if name in skipped]
    what = "linear is" if len(names) == 1 else "linears are"
    return f"{len(names)} {what} not quantized, {why}: {by_last_name(names)}"


def by_last_name(linears: Iterable[str]) -> str:
    """What linears are called in all layers, and how many there are of each."""
    counts = collections.Counter(name.rpartition(".")[2] for name in linears)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _no_match(asked: str, linears: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"skip_modules {asked[:100]!r} matches no linear that is quantized",
        f"those are {by_last_name(linears)}",
    )


SMALLEST, FEWEST_ROWS = 4096, 32
"""Elements below which a linear is not worth quantizing, and rows up to which it is a gate."""
NAMED = 5
"""Modules that a warning names."""
LARGE = 0.1
"""The share of all weights from which names are told, or a model is refused."""


@dataclass(frozen=True)
class Share:
    """Elements that stay in 16 bits: those of embeddings and head, and the rest by module.

    `sizes` are their bytes, those of embeddings and head together as of the module "".
    """

    total: int
    ends: int
    others: Mapping[str, int]
    sizes: Mapping[str, int]

    @property
    def count(self) -> int:
        """All elements that stay."""
        return self.ends + sum(self.others.values())

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(self.sizes.values())

    def said(self, dtype: str) -> str:
        """A sentence with the bytes that stay in a `dtype`, and per cent of all weights."""
        others = self.count - self.ends
        return (
            f"{size_text(self.nbytes)} stay in {dtype}, {self._part(self.count)} of the "
            f"weights: embedding and head {self._part(self.ends)}, the rest {self._part(others)}"
        )

    def warning(self, dtype: str) -> str | None:
        """The modules beside embedding and head with their bytes, if they are above a tenth."""
        others = self.count - self.ends
        if others <= LARGE * self.total:
            return None
        sizes = Counter({name: size for name, size in self.sizes.items() if name})
        largest = sizes.most_common(NAMED)
        named = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        return (
            f"{self._part(others)} of the weights stay in {dtype} beside embedding and head, "
            f"{size_text(sizes.total())}: {named}{more}"
        )

    def _part(self, count: int) -> str:
        return f"{count / self.total:.1%}"


def share_of(
    model: Any,
    quantized: Collection[str],
    shared: Collection[str],
    itemsize: Callable[[str], int],
) -> Share:
    """What stays in 16 bits of a model where the linears named `quantized` do not.

    `shared` are the names of tensors that share another one's storage, and count there; modules of
    one name in all layers are one. `itemsize` is what an element of a tensor takes.
    """
    inner = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    total, ends = 0, 0
    others, sizes = Counter[str](), Counter[str]()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if f"{name}.{leaf}" in shared:  # on the meta device it is there twice
                continue
            total += parameter.numel()
            if name in quantized and leaf == "weight":
                continue
            part = "" if id(module) in inner else _part(name, leaf)
            sizes[part] += parameter.numel() * itemsize(f"{name}.{leaf}")
            if part:
                others[part] += parameter.numel()
            else:
                ends += parameter.numel()
    return Share(total, ends, others, sizes)


def small_linears(linears: Mapping[str, Any]) -> frozenset[str]:
    """The names of linears that are small: few elements, or the few rows of a gate or a router."""
    return frozenset(
        name
        for name, layer in linears.items()
        if layer.in_features * layer.out_features < SMALLEST or layer.out_features <= FEWEST_ROWS
    )


def large_others(model: nn.Module) -> dict[str, int]:
    """Elements of weights that make more than a tenth and are no linear's, embedding's or such.

    By what they are called in all layers.
    """
    found: Counter[str] = Counter()
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.numel() >= SMALLEST:
                found[f"{_part(name, leaf)} ({type(module).__name__})"] += parameter.numel()
    whole = sum(found.values()) > LARGE * total
    return dict(found.most_common(3)) if whole else {}


def _part(name: str, leaf: str) -> str:
    """What a module is called in all layers: the last part of its name that is no number."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else leaf
