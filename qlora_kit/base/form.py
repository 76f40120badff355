"""The form that a base's linears have in its files, and the one that they are held in.

A checkpoint holds numbers, 8-bit floats with scales, or what bitsandbytes has quantized; a run
holds 4 or 8 bits, or 16. What config.json says is asked first (`stated_form`), before the files are
opened; the tensors' headers decide (`form_in_files`). Both are refused here where they do not go
together with each other or with the options.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.base.bnb_checkpoint import StoredLinear, agree, split_stored, stored_quantization
from qlora_kit.base.checks import check_architecture
from qlora_kit.base.fp8_checkpoint import ScaledWeight, assume_scaled, split_scaled
from qlora_kit.base.fp8_scheme import Fp8Scheme, fp8_scheme
from qlora_kit.base.meta_model import decoder_linears, expected_shapes, tied_names
from qlora_kit.base.quantize import Quantization
from qlora_kit.base.safetensors_file import TensorEntry, some
from qlora_kit.base.skipped import left_linears, listed_modules, not_quantized
from qlora_kit.config.base import QUANT_TYPES, BaseConfig
from qlora_kit.device.target import dtype_name
from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import joined


@dataclass(frozen=True)
class StatedForm:
    """What config.json and the options say: `quantization` is how linears are held.

    `is_stored` where bitsandbytes has quantized them already, but those that `listed` names;
    `scheme` where they are 8-bit floats.
    """

    quantization: Quantization
    is_stored: bool = False
    listed: tuple[str, ...] = ()
    scheme: Fp8Scheme | None = None


@dataclass(frozen=True)
class Form:
    """The form of each linear by name: `stored` by bitsandbytes, `scaled` as 8-bit floats.

    `skipped` linears are not quantized. `unread` are tensors of the files that hold no numbers of
    the model: the scales. `notes` are what a user should know of all this.
    """

    stored: Mapping[str, StoredLinear] = field(default_factory=dict)
    scaled: Mapping[str, ScaledWeight] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def in_bits(held: Quantization, bits: int) -> Quantization:
    """How linears of a base `held` so are held in `bits`: as they are, else nf4 in double quant."""
    if held.bits == bits:
        return held
    quant_type, double_quant = (QUANT_TYPES[0], True) if bits == 4 else (None, None)
    return Quantization(bits, quant_type, double_quant, held.skip_modules, held.head_bits)


def stated_form(config: BaseConfig, described: Mapping[str, Any], path: Path) -> StatedForm:
    """What the config.json `described` (of `path`) and the options say.

    Errors: `ModelError` for a form that is not read, `ConfigError` for options that contradict it.
    """
    quantized = stored_quantization(described, path)
    quantization = agree(config, quantized, path)
    if quantized is None:
        return StatedForm(quantization, scheme=fp8_scheme(described, path))
    if config.skip_modules is not None:
        raise ConfigError(
            f"--skip_modules {joined(config.skip_modules)} contradicts {path}: its weights are "
            "already quantized, and those that are not stay so",
            "leave --skip_modules out, or give the original 16-bit model",
        )
    listed = described["quantization_config"].get("llm_int8_skip_modules")
    names = listed if isinstance(listed, list) else []
    return StatedForm(quantization, True, tuple(one for one in names if isinstance(one, str)))


def form_in_files(
    stated: StatedForm, entries: Mapping[str, TensorEntry], model: PreTrainedModel, where: Path
) -> Form:
    """The form that the files' headers show, compared with the architecture of `model`.

    Errors: `ModelError` with file and tensor, `ConfigError` for `--skip_modules` without a match.
    """
    linears, expected = decoder_linears(model), expected_shapes(model)
    stored: dict[str, StoredLinear] = {}
    plain = dict(entries)
    if stated.is_stored:
        stored, plain = split_stored(entries, linears, stated.quantization, where)
        expected = {
            name: shape
            for name, shape in expected.items()
            if name.removesuffix(".weight") not in stored
        }
    scaled, plain = split_scaled(plain, stated.scheme, expected, where)
    check_architecture(plain, expected, tied_names(model), where)
    if stated.is_stored:
        skipped = frozenset(linears.keys() - stored.keys())
        notes = _stored_notes(linears, skipped, stated.listed)
    else:
        skipped, notes = left_linears(stated.quantization, linears, model)
    taken = {entry for one in stored.values() for entry in one.entries.values()}
    unread = frozenset(name for name in entries.keys() - plain.keys() if entries[name] not in taken)
    own = {weight.scales for weight in scaled.values()}
    others = {name.rpartition(".")[2] for name in unread if entries[name] not in own}
    notes += _scaled_notes(scaled, others, model.dtype)
    return Form(stored, scaled, skipped, unread, notes)


def form_of_config(
    stated: StatedForm, entries: Mapping[str, TensorEntry], model: PreTrainedModel
) -> tuple[Form, Mapping[str, TensorEntry]]:
    """The form that config.json alone promises, and the headers of such a checkpoint.

    `entries` are those of a checkpoint of numbers; one that bitsandbytes quantized is taken as if
    it held numbers. Errors: `ConfigError` for `--skip_modules` without a match.
    """
    linears = decoder_linears(model)
    if stated.is_stored:
        return Form(skipped=listed_modules(stated.listed, linears)), entries
    skipped, notes = left_linears(stated.quantization, linears, model)
    if stated.scheme is None:
        return Form(skipped=skipped, notes=notes), entries
    scaled, made = assume_scaled(entries, linears, stated.scheme)
    return Form({}, scaled, skipped, frozenset(made.keys() - entries.keys()), notes), made


def _stored_notes(
    linears: Mapping[str, nn.Linear], skipped: frozenset[str], listed: Sequence[str]
) -> tuple[str, ...]:
    """What a bitsandbytes checkpoint left in 16 bits, and where its config.json says otherwise."""
    notes = []
    if skipped:
        notes.append(not_quantized(linears, skipped, "as the files have them"))
    promised = listed_modules(listed, linears)
    for names, says, there in (
        (promised - skipped, "lists", "quantized"),
        (skipped - promised, "does not list", "in 16 bits"),
    ):
        if names:
            notes.append(
                f"llm_int8_skip_modules of config.json {says} "
                f"{some([name for name in linears if name in names])}, which the files hold "
                f"{there}: the files decide"
            )
    return tuple(notes)


def _scaled_notes(
    scaled: Mapping[str, ScaledWeight], others: Collection[str], dtype: torch.dtype
) -> tuple[str, ...]:
    if not scaled:
        return ()
    notes = [f"{len(scaled)} weights are 8-bit floats: read as {dtype_name(dtype)} numbers"]
    if others:
        notes.append(f"scales of activations are not used: {', '.join(sorted(others))}")
    return tuple(notes)
