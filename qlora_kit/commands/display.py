"""What `finetune` shows on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qlora_kit.commands.progress import MEASURES, TrainingProgress, loss_text
from qlora_kit.commands.terminal import Terminal, size
from qlora_kit.run.reporter import Reporter, StepReporter

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.config.lora import LoRAConfig
    from qlora_kit.config.run import RunConfig
    from qlora_kit.data.order import Packs
    from qlora_kit.data.outcome import EncodedRows
    from qlora_kit.data.rows import Row, Rows
    from qlora_kit.plan.memory_plan import MemoryPlan
    from qlora_kit.training.loss import Evaluation

SHOWN_ANSWER = 160
"""Characters of an answer that are shown, at most."""
SHOWN_PROMPT = 400
"""Characters of a prompt that is shown as a command, at most."""


class Display(Reporter):
    """Prints a run as it goes; one method for each thing that there is to say."""

    def __init__(self) -> None:
        self._terminal = Terminal()
        self._line = self._terminal.line

    def note(self, text: str) -> None:
        """One line that the reader should not miss."""
        self._terminal.note(text)

    def text_file(self, path: Path, why: str) -> None:
        """A file, and why it is shown."""
        self._terminal.print((why, "bold"), f" ({path.name})")
        for line in path.read_text(encoding="utf-8").splitlines():
            self._terminal.print("  ", (line, "dim"))

    def base(self, base: Base, targets: Sequence[str], lora: LoRAConfig) -> None:
        """Which base, in which form, and where the adapters go."""
        form = base.quantization
        held = "not quantized"
        if form.bits == 4:
            held = f"{form.quant_type}{', double quant' if form.double_quant else ''}"
        elif form.bits == 8:
            held = "int8"
        dtype = str(base.dtype).removeprefix("torch.")
        self._line("base", f"{base.source.name}, {form.bits} bits ({held}), {dtype}, {base.device}")
        if base.left is not None:
            self._line("16 bits", base.left)
        if base.warning is not None:
            self.note(base.warning)
        if base.embedding_rows is not None:
            self.note(
                f"the embedding has {base.embedding_rows} rows, one for each token: new ones are "
                "the mean of the others, and are not trained"
            )
        kinds = sorted({name.rpartition(".")[2] for name in targets})
        self._line("adapters", f"r {lora.r} on {len(targets)} linears: {', '.join(kinds)}")
        if lora.target_modules == "all-linear":
            self.note(
                "all-linear learns more in a step than query and value alone, with several times "
                "the adapter memory and more time a step"
            )

    def data(
        self,
        rows: Rows,
        encoded: EncodedRows,
        held_out: EncodedRows | None,
        packs: Packs | None = None,
    ) -> None:
        """Rows, tokens, and what was skipped, cut, or is there twice."""
        self._line("data", f"{rows.train_source} ({rows.format}): {_counts(encoded)}")
        if held_out is None:
            self._line("held out", f"{rows.eval_source}; no evaluation")
        else:
            self._line("held out", f"{rows.eval_source}: {_counts(held_out)}")
        for note in encoded.notes():
            self.note(note)
        for note in held_out.notes(held_out=True) if held_out else ():
            self.note(note)
        if packs is not None:
            count = len(packs)
            into = f"{count} pack{'' if count == 1 else 's'}"
            self._line("packing", f"{len(encoded.rows)} rows in {into}")
        shared = held_out.shared_with(encoded) if held_out else 0
        if shared:
            are = "is" if shared == 1 else "are"
            self.note(f"{shared} of the held-out rows {are} also trained on")

    def chats(self, text: str) -> None:
        """At which tokens answers stop, and the day that a dated template writes."""
        self._line("chats", text)

    def bits(self, measured: Mapping[int, Mapping[str, int]]) -> None:
        """The memory of the same base in several numbers of bits, side by side."""
        table = Table(title="memory of the base, loaded once in each", title_justify="left")
        for title in ("bits", "linear layers", "embeddings, head, norms", "total", "of 16 bits"):
            table.add_column(title, justify="right")
        for bits, sizes in measured.items():
            linears = sizes["weights_quantized"]
            other = sizes["weights_other"]
            if bits == 16:
                # Nothing is quantized there; what the other two quantize is the difference.
                other = measured[4]["weights_other"]
                linears = sizes["weights"] - other
            table.add_row(
                str(bits),
                size(linears),
                size(other),
                size(sizes["weights"]),
                f"{sizes['weights'] / measured[16]['weights']:.0%}",
            )
        self._terminal.show(table)

    def memory(self, plan: MemoryPlan) -> None:
        """What the run will take by component, and which layers recompute at what cost."""
        names = ("weights", "adapters", "gradients", "optimizer", "paged", "activations", "loss")
        parts = [f"{name} {size(plan.bytes[name])}" for name in names if plan.bytes[name]]
        self._line("plan", f"{', '.join(parts)}; peak {size(plan.peak_bytes)} in {plan.place}")
        again = f"{plan.recomputed:.0%} of a forward pass is done again"
        budget = "" if plan.budget_bytes is None else f", {size(plan.budget_bytes)} available"
        self._line("recompute", f"{plan.recompute}: {again}{budget}")
        self._line("optimizer", plan.optimizer)
        if placed := plan.placed(size):
            self._line("placement", placed)
        if plan.host_note is not None:
            self.note(plan.host_note)
        if plan.missing_bytes:
            self.note(
                f"the plan is {size(plan.missing_bytes)} above what is "
                f"available: lower {plan.lower_length}, or see what `qlora-kit plan` with the same "
                "options names"
            )

    def loading(self, base: Base) -> None:
        """That weights are being read now."""
        self._line("loading", f"{len(base.entries)} tensors")

    def evaluation(self, step: int, found: Evaluation) -> None:
        """The held-out loss in the middle of a run."""
        self._terminal.print(f"held-out loss after step {step}: {loss_text(found)}")

    def progress(self, total_steps: int, memory: str) -> AbstractContextManager[StepReporter]:
        """A bar over the steps of a run; `memory` says what its bytes are those of."""
        return TrainingProgress(self._terminal, total_steps, memory)

    def answers(self, questions: Sequence[Row], answers: Sequence[Sequence[str]]) -> None:
        """Held-out prompts with the answers before and after training."""
        if not questions:
            return
        right = [0, 0]
        for number, row in enumerate(questions):
            expected = row.content["completion"].strip()
            self._terminal.print("\n", (f"held-out prompt {number + 1}", "bold"))
            self._terminal.print((row.content["prompt"].strip(), "dim"))
            for when, texts in enumerate(answers):
                text = texts[number].strip()
                good = text == expected
                right[when] += good
                label = ("before", "after ")[when]
                mark = ("right", "green") if good else ("wrong", "red")
                self._terminal.print("  ", (label, "bold"), " ", mark, f": {_one_line(text)}")
            self._terminal.print("  ", ("expected", "bold"), f"    : {_one_line(expected)}")
        self._terminal.print(
            f"\nright answers: {right[0]} of {len(questions)} before, "
            f"{right[1]} of {len(questions)} after"
        )

    def result(
        self,
        run: Mapping[str, Any],
        directory: Path,
        config: RunConfig,
        prompts: Sequence[str],
        is_chat: bool,
    ) -> None:
        """What the run gave, and how to go on: with one of the held-out prompts that is short."""
        self._terminal.print()
        train, evaluation, memory = run["train"], run["eval"], run["memory"]
        measured = memory["measured"]
        self._line(
            "trained",
            f"{train['steps']} steps in {train['seconds']:.0f} s, "
            f"{train['tokens_per_s']:,.0f} tokens/s, "
            f"loss {train['first_loss']:.3f} -> {train['last_loss']:.3f}",
        )
        if evaluation:
            before, after = evaluation["loss_before"], evaluation["loss_after"]
            pairs = "".join(
                f"{name} {evaluation[f'{name}_before']:{form}} -> "
                f"{evaluation[f'{name}_after']:{form}}, "
                for name, form in MEASURES.items()
                if f"{name}_before" in evaluation
            )
            self._line(
                "held out",
                f"loss {before:.3f} -> {after:.3f} ({(after - before) / before:+.0%}), {pairs}"
                f"{evaluation['tokens']:,} tokens",
            )
        parts = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "peak")
        listed = ", ".join(f"{part} {size(measured[part])}" for part in parts if part in measured)
        listed = listed.replace(", peak", "; peak")
        planned = f", planned {size(memory['planned']['peak'])}" if "planned" in memory else ""
        self._line("measured", f"{listed} in {memory['peak_at']}{planned}")
        self._line("process", f"{size(memory['process'])} {memory['process_is']}")
        self._line("saved", str(directory))
        self._line(
            "try it",
            f"qlora-kit generate --model {config.base.model} --bits {config.base.bits} "
            f"--adapter {directory} {'--chat ' if is_chat else ''}--prompt "
            + next((shell_word(one) for one in prompts if len(one) <= SHOWN_PROMPT), "'...'"),
        )

    def sent(self, address: str) -> None:
        """Where the adapter is on the hub."""
        self._line("sent", address)


def shell_word(text: str) -> str:
    """`text` as one word of a shell; a line's end, which a prompt may need, stays on the line."""
    if text.isprintable():
        return shlex.quote(text)
    known = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}
    shown = (known.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f"$'{''.join(shown)}'"


def _counts(encoded: EncodedRows) -> str:
    return f"{encoded.count}, {encoded.tokens:,} tokens, {encoded.supervised_tokens:,} trained on"


def _one_line(text: str) -> str:
    text = " | ".join(line for line in text.splitlines() if line.strip())
    return text if len(text) <= SHOWN_ANSWER else text[: SHOWN_ANSWER - 3] + "..."
