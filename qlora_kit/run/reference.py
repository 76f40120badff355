"""What a run that learns from pairs is measured against: its model as it was before the first step.

That is the base with the adapter switched off, or the adapter that the run goes on with. The
log-probabilities of its answers never change, so they are computed once, in the batches in which
held-out rows are evaluated, and lie in the checkpoints: a resumed run has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.batch import eval_pairs
from qlora_kit.data.outcome import EncodedRows
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.lora.inject import switch_of
from qlora_kit.run.evaluation import HeldOut
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.training.preference import reference_log_probabilities

References = dict[str, Tensor]
"""A number for each encoded row, of `train` and, where rows are held out, of `eval`."""


def find_references(
    plan: PreparedRun,
    model: Any,
    held_out: HeldOut,
    kept: References,
    note: Callable[[str], None],
) -> References:
    """Those `kept` in the run's checkpoint where they are of these rows and this base, else new.

    Errors: `ConfigError` where they are of other rows, and the adapter that the run began with is
    trained by now; `NumericError` where one is not finite; those of `in_batches`.
    """
    parts = {"train": plan.encoded} | ({"eval": plan.held_out} if plan.held_out else {})
    if _are_of(plan, parts, kept):
        return kept
    if plan.config.lora.adapter is not None and plan.resume is not None:
        raise ConfigError(
            f"{plan.resume.path} has no log-probabilities of these rows by the adapter that the "
            "run began with",
            "start a new run, or leave --override out",
        )
    off = plan.config.lora.adapter is None
    pairs = sum(part.pairs for part in parts.values())
    note(
        f"{'the base' if off else 'the adapter as it is now'} reads {pairs:,} pairs once: their "
        "log-probabilities are what a run's are compared with"
    )
    with _adapter_off(model) if off else contextlib.nullcontext():
        found = {
            name: _log_probabilities(plan, model, held_out, part) for name, part in parts.items()
        }
    for name, values in found.items():
        if bad := int((~values.isfinite()).sum()):
            raise NumericError(
                f"the model as it begins gives {bad} of {len(values)} rows ({name}) a probability "
                "that is no number",
                "use --dtype bf16 or fp32, or check the base",
            )
    return found


def _log_probabilities(
    plan: PreparedRun, model: Any, held_out: HeldOut, part: EncodedRows
) -> Tensor:
    def found(rows: int, tokens: int) -> Tensor:
        unknown = torch.zeros(len(part.rows))
        batches = eval_pairs(part.rows, unknown, rows, plan.schedule.pad_id, tokens)
        return reference_log_probabilities(model, batches, len(part.rows))

    return held_out.in_batches(found, "pair", "before the first step")


def _are_of(plan: PreparedRun, parts: dict[str, EncodedRows], kept: References) -> bool:
    """Whether references of a checkpoint are those of this run's rows."""
    if plan.resume is None or plan.resume.state.get("identity") != dict(plan.identity):
        return False
    return kept.keys() == parts.keys() and all(
        values.shape == (len(parts[name].rows),)
        and values.dtype is torch.float32
        and bool(values.isfinite().all())
        for name, values in kept.items()
    )


@contextlib.contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """Inside, the model is its base."""
    switch = switch_of(model)
    active, switch.active = switch.active, None
    try:
        yield
    finally:
        switch.active = active
