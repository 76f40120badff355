"""The linears that a run adapts: refused where rank, room or names do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.files.atomic import check_room
from qlora_kit.lora.names import check_keys
from qlora_kit.lora.targets import auto_note, check_rank, find_targets
from qlora_kit.run.reporter import Reporter
from qlora_kit.training.checkpoint import SLACK_BYTES
from qlora_kit.training.optimizer import state_bytes


def check_targets(
    lora: LoRAConfig,
    base: Base,
    directory: Path,
    optim: str,
    ranks: Mapping[str, int] | None,
    reporter: Reporter,
) -> Mapping[str, int]:
    """Refuse targets, rank or a full disk; the base and its adapters are shown.

    `ranks` are those of an adapter to go on with, by linear; returns those of the run.
    Errors: `ConfigError`, `ResourceError`.
    """
    check_keys(base, lora.adapter_keys)
    targets = find_targets(base.model, lora.target_modules)
    if ranks_are_new := ranks is None:
        ranks = dict.fromkeys(targets, lora.r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when the adapters are made
            check_rank(base.model, targets, lora.r)
    reporter.base(base, targets, lora)
    if ranks_are_new and lora.target_modules == "auto" and (note := auto_note(base.model)):
        reporter.note(note)
    layers = {name: base.model.get_submodule(name) for name in ranks}
    parameters = sum(
        ranks[name] * (layer.in_features + layer.out_features) for name, layer in layers.items()
    )
    # The first checkpoint beside the result: masters, states, and the adapter twice.
    needed = int(parameters * (4 + state_bytes(optim) + 2 * 4)) + 2 * SLACK_BYTES
    check_room(directory, needed, "the first checkpoint with the result")
    return ranks
