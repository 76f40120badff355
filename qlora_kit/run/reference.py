"""What a run that learns from pairs is measured against: its model as it was before the first step.

That is the base with the adapter switched off, or the adapter that the run goes on with. The
log-probabilities of its answers never change, so they are computed once and lie in the checkpoints:
a resumed run has the same bits. Held-out pairs are read in the batches that they are evaluated in,
the others in the micro-batches that the run first sees them in. So a run that is to take more steps
than before reads what is missing, and has the bits of one that was to take as many from the start.
An adapter reads every pair: it is trained by then.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.data.batch import PAIR, Batch, eval_pairs
from qlora_kit.data.outcome import EncodedRows
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.lora.inject import switch_of
from qlora_kit.run.evaluation import HeldOut
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.training.preference import reference_log_probabilities

References = dict[str, Tensor]
"""A number for each encoded row, of `train` and, where rows are held out, of `eval`."""
UNKNOWN = 1.0
"""Of a row that no step needs: no log-probability is above 0, and what is kept is finite."""


def find_references(
    plan: PreparedRun,
    model: Any,
    held_out: HeldOut,
    kept: References,
    note: Callable[[str], None],
) -> References:
    """Those `kept` in the run's checkpoint where they are of these rows and this base, else new.

    Errors: `ConfigError` where one is missing, and the adapter that the run began with is trained
    by now; `NumericError` where one is not finite; those of `in_batches`.
    """
    parts = {"train": plan.encoded} | ({"eval": plan.held_out} if plan.held_out else {})
    if not _are_of(plan, parts, kept):
        kept = {name: torch.full((len(part.rows),), UNKNOWN) for name, part in parts.items()}
    off = plan.config.lora.adapter is None
    missing = {name: _missing(plan, name, values, off) for name, values in kept.items()}
    count = sum(len(rows) for batches in missing.values() for rows in batches) // PAIR
    if not count:
        return kept
    if not off and plan.resume is not None:
        raise ConfigError(
            f"{plan.resume.path} has no log-probabilities of these rows by the adapter that the "
            "run began with",
            "start a new run, or leave --override out",
        )
    note(
        f"{'the base' if off else 'the adapter as it is now'} reads {count:,} pairs once: their "
        "log-probabilities are what a run's are compared with"
    )
    found = {name: values.clone() for name, values in kept.items()}
    with _adapter_off(model) if off else contextlib.nullcontext():
        for name, batches in missing.items():
            if not batches:
                continue
            rows = list(itertools.chain(*batches))
            read = _log_probabilities(plan, model, held_out, parts[name], batches)[rows]
            if bad := int((~read.isfinite()).sum()):
                raise NumericError(
                    f"the model as it begins gives {bad} of {len(rows)} rows ({name}) a "
                    "probability that is no number",
                    "use --dtype bf16 or fp32, or check the base",
                )
            found[name][rows] = read
    return found


def _missing(plan: PreparedRun, name: str, values: Tensor, few: bool) -> list[list[int]]:
    """The batches to be read of a part, by their rows: of `train` those in which the run begins.

    A `few` are those of its steps in the first epoch, else they are all of that epoch.
    """
    unknown = set((values == UNKNOWN).nonzero().flatten().tolist())
    batches = [sorted(unknown)]
    if name == "train":
        schedule, steps = plan.schedule, plan.schedule.steps_per_epoch
        steps = min(steps, schedule.num_steps) if few else steps
        of_steps = replace(schedule, num_steps=steps).sequences()
        batches = [list(itertools.chain(*pairs)) for pairs in itertools.chain(*of_steps)]
    return [rows for rows in batches if not unknown.isdisjoint(rows)]


def _log_probabilities(
    plan: PreparedRun, model: Any, held_out: HeldOut, part: EncodedRows, batches: list[list[int]]
) -> Tensor:
    def found(pairs: int, tokens: int) -> Tensor:
        read: Iterator[tuple[list[int], Batch]]
        if part is plan.held_out:
            unknown = torch.zeros(len(part.rows))
            read = eval_pairs(part.rows, unknown, pairs, plan.schedule.pad_id, tokens)
        else:
            most = PAIR * pairs
            parts = (one[at : at + most] for one in batches for at in range(0, len(one), most))
            read = ((rows, plan.schedule.collate([rows])) for rows in parts)
        return reference_log_probabilities(model, read, len(part.rows))

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
