"""What a run tells whoever started it, as it goes; a reporter of this kind says nothing.

`commands/display.py` shows it on a terminal. One method for each thing that there is to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A run is refused before torch is imported, and what refuses it may have something to note.
    from qlora_kit.base.base import Base
    from qlora_kit.config.lora import LoRAConfig
    from qlora_kit.config.run import RunConfig
    from qlora_kit.data.order import Packs
    from qlora_kit.data.outcome import EncodedRows
    from qlora_kit.data.rows import Row, Rows
    from qlora_kit.plan.memory_plan import MemoryPlan
    from qlora_kit.training.loop import StepReport
    from qlora_kit.training.loss import Evaluation


class StepReporter:
    """Is called with each step of a run."""

    def start(self, before: Evaluation | None) -> None:
        """The next thing is a step; `before` is the held-out loss of a run that is not resumed."""

    def step(self, report: StepReport, peak: int) -> None:
        """A step is done; `peak` is in bytes."""


class Reporter:
    """Is called from the preparation of a run to its result."""

    def note(self, text: str) -> None:
        """One line that the reader should not miss."""

    def base(self, base: Base, targets: Sequence[str], lora: LoRAConfig) -> None:
        """Which base, in which form, and where the adapters go."""

    def data(
        self,
        rows: Rows,
        encoded: EncodedRows,
        held_out: EncodedRows | None,
        packs: Packs | None = None,
    ) -> None:
        """Rows, tokens, and what was skipped, cut, or is there twice."""

    def chats(self, text: str) -> None:
        """At which tokens answers stop, and the day that a dated template writes, in words."""

    def bits(self, measured: Mapping[int, Mapping[str, int]]) -> None:
        """The memory of the same base in several numbers of bits: bytes by component."""

    def memory(self, plan: MemoryPlan) -> None:
        """What the run will take by component, and which layers recompute at what cost."""

    def loading(self, base: Base) -> None:
        """Weights are being read now."""

    def evaluation(self, step: int, found: Evaluation) -> None:
        """The held-out loss in the middle of a run."""

    def progress(self, total_steps: int, memory: str) -> AbstractContextManager[StepReporter]:
        """Around the steps of a run; `memory` says what the bytes of a step are those of."""
        return nullcontext(StepReporter())

    def answers(self, questions: Sequence[Row], answers: Sequence[Sequence[str]]) -> None:
        """Held-out prompts with the answers before and after training."""

    def result(
        self,
        run: Mapping[str, Any],
        directory: Path,
        config: RunConfig,
        prompts: Sequence[str],
        is_chat: bool,
    ) -> None:
        """What the run gave (`run.json`), and held-out prompts to go on with."""

    def sent(self, address: str) -> None:
        """The adapter is on the hub."""
