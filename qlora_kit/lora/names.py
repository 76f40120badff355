"""What modules are called in adapters' files: as in the text model, or as in a multimodal class.

transformers' multimodal classes have the text decoder's modules under `model.language_model` (a few
elsewhere), and so have PEFT and servers that load such a class; with the text model's names they
find nothing, vLLM without an error. `prefix` is what stands there in place of the text model's
`model.`; a head outside it keeps its name.

Programs that train with PEFT save its keys with more around them: the wrappers that a module had
in training, the adapter's name, PEFT's prefix twice or not at all. `plain_keys` takes them off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from qlora_kit.base.base import Base
from qlora_kit.base.safetensors_file import some
from qlora_kit.base.text_decoder import PREFIXES, is_tower
from qlora_kit.errors import AdapterError, ConfigError

KEY_PREFIX = "base_model.model."
OWN = "model."
"""What the names of a text model's decoder begin with."""
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Modules around others in training: of torch.compile, DDP, FSDP, and recomputation."""
PREFIXED = re.compile(rf"({re.escape(KEY_PREFIX)})*")


def module_key(module: str, part: str, prefix: str = OWN) -> str:
    """PEFT's name of A or B of a module of the text model."""
    return f"{KEY_PREFIX}{in_class(module, prefix)}.lora_{part}.weight"


def plain_keys(keys: Iterable[str], path: Path) -> dict[str, str]:
    """Each key of an adapter's file (`path`) as PEFT writes it to the key as it stands there.

    What is no key of A or B stays as it is. Errors: `AdapterError` for several adapters in a file.
    """
    found: dict[str, str] = {}
    names = set()
    for key in keys:
        module, _, rest = key.partition(".lora_")
        part, *adapter = rest.removesuffix(".weight").split(".")
        plain = key
        if part in ("A", "B") and rest.endswith(".weight"):
            inner = ".".join(name for name in module.split(".") if name not in WRAPPERS)
            plain = f"{KEY_PREFIX}{PREFIXED.sub('', inner, count=1)}.lora_{part}.weight"
            names.add(".".join(adapter))
        if len(names) > 1 or plain in found:
            both = sorted(name or "one without a name" for name in names)
            said = f"several adapters ({some(both)})" if len(names) > 1 else f"{plain} twice"
            raise AdapterError(f"{path}: holds {said}", "save one adapter in a directory")
        found[plain] = key
    return found


def in_class(module: str, prefix: str) -> str:
    """The name of a module of the text model in the class that has its decoder under `prefix`."""
    return prefix + module.removeprefix(OWN) if module.startswith(OWN) else module


def in_model(module: str, prefix: str) -> str:
    """The reverse of `in_class`."""
    return OWN + module.removeprefix(prefix) if module.startswith(prefix) else module


def check_keys(base: Base, keys: str | None) -> None:
    """Refuse names of a multimodal class where there is none. Errors: `ConfigError`."""
    if keys == "wrapper" and base.wrapper is None:
        raise ConfigError(
            f"adapter_keys wrapper is given, and {base.source.name} is no multimodal checkpoint",
            "leave --adapter_keys out",
        )


def prefix_of(model: nn.Module, keys: Iterable[str], path: Path) -> str:
    """The prefix of the keys of an adapter's file (`path`).

    Errors: `AdapterError` for an adapter of towers too, or names under two prefixes.
    """
    modules = {name for name, _ in model.named_modules()}
    names = {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for key in keys} - modules
    if towers := sorted(name for name in names if is_tower(name)):
        raise AdapterError(
            f"{path}: adapts {some(towers)}, of towers that are left out here",
            "use an adapter of the language model alone",
        )
    prefixes = {prefix for name in names for prefix in PREFIXES[:-1] if name.startswith(prefix)}
    if len(prefixes) > 1:
        raise AdapterError(
            f"{path}: names modules under two prefixes ({', '.join(sorted(prefixes))})",
            "save the adapter again",
        )
    return prefixes.pop() if prefixes else OWN
