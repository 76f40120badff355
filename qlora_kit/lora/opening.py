"""The files of an adapter: checked against a model, and then its weights, read once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.base import BaseInfo
from qlora_kit.base.safetensors_file import TensorEntry
from qlora_kit.base.tensors import CPU, checks_later, read_tensors
from qlora_kit.config.lora import scaling_of
from qlora_kit.device.target import DTYPES
from qlora_kit.errors import AdapterError
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter
from qlora_kit.lora.names import module_key, plain_keys, prefix_of
from qlora_kit.lora.targets import adapted_modules

SCALE_OPTIONS = ("r", "lora_alpha", "use_rslora")
"""What the header repeats of the config: a changed one scales the update, and no shape shows it."""


class OpenAdapter(NamedTuple):
    """An adapter whose files were checked against a model, before its weights are read."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    """Its tensors by PEFT's keys."""
    modules: dict[str, tuple[int, float]]
    """Rank and alpha of each linear that it adapts."""
    dtype: torch.dtype
    prefix: str
    """What the decoder's names begin with in the files."""

    def scaling(self, module: str) -> float:
        """What the low-rank product of a linear that it adapts is multiplied by."""
        r, alpha = self.modules[module]
        return scaling_of(r, alpha, bool(self.config.get("use_rslora")))

    def read(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        rest: Callable[[], object] = lambda: None,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in_features) and B (out_features, r) of each linear that it adapts, on `device`.

        Each lies in memory of its own, in `dtype` or as stored. `rest` is called between them.
        Errors: `NumericError`.
        """
        checks = checks_later(torch.empty(0, device=device))
        kept = dict.fromkeys(self.entries, dtype or self.dtype)
        tensors = {}
        for name, tensor in read_tensors(self.entries, device=device, kept=kept, checks=checks):
            tensors[name] = tensor
            rest()
        if checks is not None:
            checks.read()
        weights = {}
        for name in self.modules:
            a, b = (tensors[module_key(name, part, self.prefix)] for part in "AB")
            weights[name] = a, b
        if not torch.stack([b.any() for _, b in weights.values()]).any():
            said = f"{self.path}: every lora_B is zero: the adapter has no effect"
            warnings.warn(said, stacklevel=3)
        return weights


def open_adapter(
    model: PreTrainedModel, files: AdapterFiles | str | os.PathLike[str], base: BaseInfo | None
) -> OpenAdapter:
    """Check an adapter's files against `model`, which may still be on the meta device.

    `base` says what the model is; None takes any that has the same shapes.
    Errors: `AdapterError` where files, shapes, targets or the base do not fit.
    """
    if not isinstance(files, AdapterFiles):
        files = read_adapter(files)
    path, config = files.weights, files.config
    entries = {plain: files.entries[key] for plain, key in plain_keys(files.entries, path).items()}
    _check_base(base, files.trained_on, path)
    _check_scale(config, files.trained_on, files.described_in)
    prefix = prefix_of(model, entries, path)
    modules = adapted_modules(model, config, files.described_in, prefix)
    expected = _expected(model, modules, prefix)
    _check_tensors({name: entry.shape for name, entry in entries.items()}, expected, path)
    dtypes = {entry.torch_dtype for entry in entries.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise AdapterError(
            f"{path}: holds {', '.join(sorted(map(str, dtypes)))}", "save it in bf16, fp16 or fp32"
        )
    return OpenAdapter(path, config, entries, modules, dtypes.pop(), prefix)


def _check_base(base: BaseInfo | None, said: Mapping[str, Any], path: Path) -> None:
    if base is None or not said.get("fingerprint"):
        return
    if said["fingerprint"] != base.fingerprint:
        raise AdapterError(
            f"{path}: was trained on {said.get('name')} with other weights than {base.name}",
            "give the base that it was trained on, or --allow_other_base",
        )
    if said.get("embedding_rows") != base.embedding_rows:
        shown = [
            rows or "the base's own" for rows in (said.get("embedding_rows"), base.embedding_rows)
        ]
        raise AdapterError(
            f"{path}: was trained with {shown[0]} embedding rows, and here are {shown[1]}",
            "use the tokenizer that it was trained with, or --allow_other_base",
        )


def _check_scale(config: Mapping[str, Any], said: Mapping[str, Any], where: Path) -> None:
    """Refuse a config whose rank or scale is not the one that the weights were saved with."""
    for option, saved in said.get("lora", {}).items():
        if option in SCALE_OPTIONS and config.get(option, False) != saved:
            raise AdapterError(
                f"{where}: {option} is {config.get(option)!r}, and the weights were saved with "
                f"{saved!r}",
                "restore the file",
            )


def _expected(
    model: PreTrainedModel, modules: Mapping[str, tuple[int, float]], prefix: str
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the tensors of an adapter on these modules."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, (r, _) in modules.items():
        layer = model.get_submodule(name)
        expected[module_key(name, "A", prefix)] = (r, layer.in_features)
        expected[module_key(name, "B", prefix)] = (layer.out_features, r)
    return expected


def _check_tensors(
    present: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    missing, surplus = sorted(expected.keys() - present), sorted(present.keys() - expected.keys())
    if missing or surplus:
        parts = []
        if missing:
            parts.append(
                f"lacks {len(missing)} tensors that its config asks for ({missing[0]} ...)"
            )
        if surplus:
            parts.append(f"holds {len(surplus)} that it does not ask for ({surplus[0]} ...)")
        remedy = "use the base and config that belong to the adapter"
        if any(".lora_" not in name for name in surplus):
            remedy = (
                "where whole weights were trained too, merge it with the program that trained it, "
                "and use the result as the base"
            )
        raise AdapterError(f"{path}: {'; '.join(parts)}", remedy)
    for name, shape in expected.items():
        if present[name] != shape:
            remedy = "use the base and the r that belong to the adapter"
            if 0 in present[name]:
                remedy = "save it again, gathered from all ranks (DeepSpeed's ZeRO-3, FSDP)"
            raise AdapterError(
                f"{path}: {name} is {list(present[name])}, expected {list(shape)}", remedy
            )
