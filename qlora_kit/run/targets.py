"""The linears that a run adapts: refused where rank, room or names do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_kit.base.base import Base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.files.atomic import check_room
from qlora_kit.lora.names import check_keys
from qlora_kit.lora.serving import NOT_PORTABLE, Served
from qlora_kit.lora.targets import auto_note, check_rank, find_targets
from qlora_kit.run.continued import Start
from qlora_kit.run.reporter import Reporter
from qlora_kit.training.checkpoint import SLACK_BYTES
from qlora_kit.training.optimizer import state_bytes


def check_targets(
    lora: LoRAConfig,
    base: Base,
    start: Start,
    reporter: Reporter,
) -> Mapping[str, int]:
    """Refuse targets or rank; the base and its adapters are shown.

    `start` has the adapter to go on with, if there is one. Returns the rank of each linear.
    Errors: `ConfigError`.
    """
    check_keys(base, lora.adapter_keys)
    targets, ranks = find_targets(base.model, lora.target_modules), start.ranks
    if ranks_are_new := ranks is None:
        ranks = dict.fromkeys(targets, lora.r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when the adapters are made
            check_rank(base.model, targets, lora.r)
    reporter.base(base, targets, lora)
    if ranks_are_new and lora.target_modules == "auto" and (note := auto_note(base.model)):
        reporter.note(note)
    for said in _serving_notes(lora, base, start):
        reporter.note(said)
    return ranks


def check_room_for(base: Base, ranks: Mapping[str, int], directory: Path, optim: str) -> None:
    """Refuse a disk that is too full for a run's adapters. Errors: `ResourceError`."""
    layers = {name: base.model.get_submodule(name) for name in ranks}
    parameters = sum(
        ranks[name] * (layer.in_features + layer.out_features) for name, layer in layers.items()
    )
    # The first checkpoint beside the result: masters, states, and the adapter twice.
    needed = int(parameters * (4 + state_bytes(optim) + 2 * 4)) + 2 * SLACK_BYTES
    check_room(directory, needed, "the first checkpoint with the result")


def _serving_notes(lora: LoRAConfig, base: Base, start: Start) -> Iterator[str]:
    """What servers will refuse of these adapters, or leave out without a word."""
    if start.files is not None:
        config = start.files.config
    else:
        config = {"r": lora.r, "use_rslora": lora.use_rslora}
    around = {} if base.wrapper is None else {"wrapper": base.wrapper.model_type}
    served = Served.of(
        config,
        {**around, "adapter_keys": lora.adapter_keys, "embedding_rows": base.embedding_rows},
    )
    if (note := served.rank_note()) is not None:
        yield note
    yield from served.notes()
    if not base.source.is_portable:
        yield NOT_PORTABLE.format(base.source.reference) + (
            "export --format adapter --base_name OWNER/NAME names it for them"
        )
