"""What is around a text decoder: a class that gives its logits, towers without a missing tensor.

transformers' own class is built on the meta device, with a text part of its defaults, and its own
renaming is asked which tensors of the files are which of the class. Where the class cannot be built
(it may need a package that is not here) nothing is said: the towers are not used.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.architecture import architecture_of, refuse_code
from qlora_kit.base.safetensors_file import some
from qlora_kit.base.text_decoder import Wrapper, is_tower
from qlora_kit.errors import ModelError

SAME_HEAD = ("gemma3n", "gemma4", "gemma4_unified")
"""Multimodal classes that change logits behind the head as their text models do; others do not."""
LARGEST = 2**24
MOST_LAYERS = 200
MOST_VALUES = 10_000
COUNTS_LAYERS = re.compile(r"(n|num)_.*(layer|block)s?|(layer|block)s|.*depths?|.*(layers|blocks)")
"""Fields that say how many layers a tower has; `block_size` or `layer_width` do not."""


def check_wrapper(wrapper: Wrapper, model: Any, path: Path) -> None:
    """Refuse a class whose logits are not those of its text `model`, and files that lack a tensor.

    `path` is that of config.json. Files without any tower are taken as a text model's.
    Errors: `ModelError` naming tensors, or a field of a tower that no tower has.
    """
    class_name = multimodal_class(wrapper.model_type)
    if class_name is None:
        raise ModelError(
            f"{path}: transformers has no multimodal model of model_type "
            f"{wrapper.model_type[:60]!r}",
            "give a model of a family that transformers builds",
        )
    scale, softcap = architecture_of(model.config.model_type).logit_scale_and_softcap(model.config)
    if (scale != 1 or softcap is not None) and wrapper.model_type not in SAME_HEAD:
        raise ModelError(
            f"{path}: behind the head {model.config.model_type} changes its logits (scale {scale:g}"
            f", soft cap {softcap}), and the class of {wrapper.model_type} does not: an adapter "
            "that fits one does not fit the other",
            "give the text model as a checkpoint of its own",
        )
    if not wrapper.left:
        return
    for field in _unbounded(_without_text(wrapper.config), ""):
        raise ModelError(f"{path}: {field}, which no tower has", "correct the file")
    for key, value in wrapper.config.items():
        if isinstance(value, dict):
            refuse_code(value, path.with_name(f"{path.name} ({key})"))
    expected = _expected(wrapper, class_name)
    if expected is None:
        return
    model, renamed = expected
    present = {renamed(name) for name in wrapper.left}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [
        name
        for name in model.state_dict()
        if is_tower(name) and name not in present and name not in tied
    ]
    if missing:
        raise ModelError(
            f"{path.parent}: lacks {some(missing)} of the towers that config.json describes",
            "fetch the files again",
        )


def _expected(wrapper: Wrapper, class_name: str) -> Any:
    """The class of that name on the meta device and its renaming of tensors; None without one."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = CONFIG_MAPPING[wrapper.model_type].from_dict(
                copy.deepcopy(dict(wrapper.config))
            )
            settings.text_config = type(settings.text_config)()
            model = getattr(transformers, class_name)(settings)
        changes = get_model_conversion_mapping(model)
    except Exception:
        # transformers raises what its own arithmetic and missing packages happen to raise.
        return None
    names = model.state_dict()
    renamings = [one for one in changes if isinstance(one, WeightRenaming)]
    converters = [one for one in changes if isinstance(one, WeightConverter)]

    def renamed(name: str) -> str:
        prefix = model.base_model_prefix
        return str(rename_source_key(name, renamings, converters, prefix, names)[0])

    return model, renamed


def multimodal_class(model_type: str) -> str | None:
    """transformers' class of a multimodal family, by name; None where it has none."""
    from transformers.models.auto import modeling_auto as auto

    for mapping in (
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        if found := mapping.get(model_type):
            return str(found)
    return None


def _without_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The objects of a config.json that are not the text decoder's."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, dict) and key not in ("text_config", "quantization_config")
    }


def _unbounded(said: Any, where: str) -> Iterator[str]:
    """The numbers and lists of a config that would take minutes or gigabytes to build."""
    inner: list[tuple[str, Any]] = []
    if isinstance(said, dict):
        inner = [(f"{where}.{key}".lstrip("."), value) for key, value in said.items()]
    elif isinstance(said, list):
        inner = [(where, value) for value in said]
    elif isinstance(said, int):
        name = where.rpartition(".")[2]
        most = MOST_LAYERS if COUNTS_LAYERS.fullmatch(name) else LARGEST
        if abs(said) > most:
            yield f"{where} is {str(said)[:60]}"
    if len(inner) > MOST_VALUES:
        yield f"{where} has {len(inner)} values"
        return
    for name, value in inner:
        yield from _unbounded(value, name)
