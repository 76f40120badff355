"""What a run is measured by beside its steps: its loss on held-out rows, and answers to prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from qlora_kit.data.batch import eval_batches, eval_pairs
from qlora_kit.data.encode import parts_of_row, prompt_ids
from qlora_kit.data.rows import Row
from qlora_kit.device.found import empty_cache
from qlora_kit.errors import ResourceError
from qlora_kit.generation.decode import answers
from qlora_kit.process.out_of_memory import is_out_of_memory
from qlora_kit.process.signals import StopSignals
from qlora_kit.run.prepare import PreparedRun
from qlora_kit.run.reporter import Reporter
from qlora_kit.training.loss import Evaluation, Objective, evaluate

Found = TypeVar("Found")

ANSWER_TOKENS = 64
EVAL_ROWS = 8
"""Rows of a batch in evaluation, at least."""


class HeldOut:
    """The held-out rows of a run, on which its model is evaluated, and prompts among them."""

    def __init__(
        self,
        plan: PreparedRun,
        model: Any,
        objective: Objective,
        reporter: Reporter,
        signals: StopSignals,
    ) -> None:
        self.questions = _questions(plan)
        self.reference: Tensor | None = None
        """Of pairs the log-probabilities that the reference gives the held-out rows."""
        self._objective = objective
        self._plan, self._model, self._reporter, self._signals = plan, model, reporter, signals
        self._rows = max(EVAL_ROWS, plan.config.training.rows)

    def loss(self, step: int) -> Evaluation | None:
        """The held-out loss after `step`; None where nothing is held out.

        Errors: `ResourceError` where one row does not fit.
        """
        held_out = self._plan.held_out
        if held_out is None:
            return None

        def evaluated(rows: int, tokens: int) -> Evaluation:
            pad = self._plan.schedule.pad_id
            if self.reference is None:
                return evaluate(self._model, eval_batches(held_out.rows, rows, pad, tokens))
            pairs = eval_pairs(held_out.rows, self.reference, rows, pad, tokens)
            return evaluate(self._model, (batch for _, batch in pairs), self._objective)

        return self.in_batches(evaluated, "held-out row", f"after step {step}")

    def in_batches(self, work: Callable[[int, int], Found], what: str, when: str) -> Found:
        """`work(rows, tokens)`, with fewer rows of a batch where the device is full.

        `what` they are, and `when`, is said where it is. Errors: `ResourceError` where one does not
        fit.
        """
        while True:
            rows = self._rows
            try:
                with self._signals.droppable(at_once=True):
                    # Forward alone of as many tokens takes less than the step that is planned.
                    return work(rows, self._plan.memory.tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    # Of a kind that lets the steps so far be saved.
                    raise ResourceError(
                        f"out of memory with one {what} {when}",
                        "lower --max_length, use --bits 4, or --eval_fraction 0",
                    ) from error
            # Here, not above: the exception held the frames, and they the activations.
            empty_cache()
            self._rows = -(-rows // 2)
            self._reporter.note(
                f"out of memory with {rows} {what}s at a time: going on with {self._rows}"
            )

    def answers(self) -> list[str]:
        """The model's answer to each question."""
        tokenizer = self._plan.base.tokenizer
        prompts = [
            prompt_ids(row.content["prompt"], tokenizer, literal=row.literal)
            for row in self.questions
        ]
        limit = _answer_tokens(self._plan.base.context)
        with self._signals.droppable(at_once=True):
            return list(answers(self._model, tokenizer, prompts, max_new_tokens=limit))


def _questions(plan: PreparedRun) -> list[Row]:
    """The first held-out rows with a prompt that leaves room for an answer in the context."""
    count, context = plan.config.output.sample_prompts, plan.base.context
    room = context - _answer_tokens(context)
    found: list[Row] = []
    for whole in plan.rows.evaluation:
        if len(found) == count:
            break
        row = parts_of_row(whole)[0]  # of a pair the chosen answer
        if "completion" in row.content:
            ids = prompt_ids(row.content["prompt"], plan.base.tokenizer, literal=row.literal)
            if 0 < len(ids) <= room:
                found.append(row)
    return found


def _answer_tokens(context: int) -> int:
    return min(ANSWER_TOKENS, context // 2)
