"""`qlora-kit finetune`: load a base in 4, 8 or 16 bits, train LoRA adapters, save them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.arguments import Parsed, parse
from qlora_kit.config import (
    BaseConfig,
    DataConfig,
    LoRAConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    dump,
)
from qlora_kit.errors import ConfigError, reports_errors

if TYPE_CHECKING:
    from qlora_kit.base.load import OpenBase
    from qlora_kit.commands.display import Display
    from qlora_kit.data.prompt import EncodedRows
    from qlora_kit.data.read import Row, Rows
    from qlora_kit.training.loop import StepReport
    from qlora_kit.training.loss import Evaluation
    from qlora_kit.training.record import MemoryRecord, RunRecord, Tracker

SUMMARY = "Load a base in 4, 8 or 16 bits, train LoRA adapters on it, save them."
GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)
QUICKSTART = Path(__file__).resolve().parent.parent / "assets" / "quickstart.yaml"
DEFAULT_LENGTH = 1024
FEW_STEPS, ENOUGH_STEPS = 20, 50
ANSWER_TOKENS = 64


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parsed = _parse(sys.argv[1:] if argv is None else argv)
    config = RunConfig(
        parsed[BaseConfig],
        parsed[DataConfig],
        parsed[LoRAConfig],
        parsed[TrainingConfig],
        parsed[OutputConfig],
    )
    from qlora_kit.commands.display import Display

    display = Display()
    if parsed.config_file == str(QUICKSTART):
        display.text_file(QUICKSTART, "no --model, --data or --config: running the quickstart")
    finetune(config, display)
    return 0


def _parse(argv: Sequence[str]) -> Parsed:
    parsed = parse("qlora-kit finetune", SUMMARY, GROUPS, argv)
    named = "model" in parsed.given[BaseConfig] or "data" in parsed.given[DataConfig]
    if parsed.config_file is None and not named:
        parsed = parse("qlora-kit finetune", SUMMARY, GROUPS, ["--config", str(QUICKSTART), *argv])
    return parsed


def finetune(config: RunConfig, display: Display) -> Path:
    """One run from its options to its files; returns the directory of the results.

    Everything that can be refused without the weights is refused before they are read.
    """
    from qlora_kit.base.load import open_base, read_weights
    from qlora_kit.base.tokenizer import copy_tokenizer
    from qlora_kit.data.batch import eval_batches, num_steps, padding_id, steps
    from qlora_kit.data.prompt import encode_rows
    from qlora_kit.data.read import load_rows
    from qlora_kit.files import check_output, filled_directory
    from qlora_kit.lora.adapter import save_adapter
    from qlora_kit.lora.inject import find_targets, inject_lora
    from qlora_kit.training.guard import Guard
    from qlora_kit.training.loop import train
    from qlora_kit.training.loss import evaluate
    from qlora_kit.training.optimizer import learning_rates, make_optimizer, paging_note
    from qlora_kit.training.recompute import set_recompute
    from qlora_kit.training.record import MetricsLog, start_trackers

    rows = load_rows(config.data, config.training.seed)
    target_dir = Path(config.output.output_dir or _free_name(config))
    base = open_base(config.base)
    check_output(target_dir, config.output.overwrite, [base.source.directory])
    config = _resolved(config, base, target_dir)
    display.base(base, find_targets(base.model, config.lora.target_modules), config.lora)
    length, training = config.data.max_length or DEFAULT_LENGTH, config.training
    encoded = encode_rows(rows.train, base.tokenizer, length, config.data.train_on_prompt)
    held_out = (
        encode_rows(rows.evaluation, base.tokenizer, length, config.data.train_on_prompt)
        if rows.evaluation
        else None
    )
    display.data(rows, encoded, held_out)
    total_steps = num_steps(
        len(encoded.rows),
        training.batch_size,
        training.gradient_accumulation_steps,
        training.num_train_epochs,
        training.max_steps,
    )
    if total_steps < FEW_STEPS:
        display.note(_few_steps(total_steps, len(encoded.rows), training))
    if config.output.compare_bits:
        display.bits(_measure_bits(config.base))

    display.loading(base)
    model = read_weights(base)
    inject_lora(model, config.lora, seed=training.seed)
    set_recompute(model, training.gradient_checkpointing)
    optimizer = make_optimizer(
        training.optim, model.parameters(), training.learning_rate, training.weight_decay
    )
    note = paging_note(training.optim, model.parameters(), base.device)
    if note:
        display.note(note)
    pad_id = padding_id(base.tokenizer)

    def held_out_loss() -> Evaluation | None:
        if held_out is None:
            return None
        return evaluate(model, eval_batches(held_out.rows, max(8, training.batch_size), pad_id))

    memory = _Memory(model, optimizer)
    guard = Guard(model)

    def trackers(directory: Path) -> Sequence[Tracker]:
        return start_trackers(config.output.report_to, directory, config.as_flat())

    def check(step: int, loss: Any, grad_norm: Any) -> None:
        guard(step, loss, grad_norm)
        memory.after_backward()

    with (
        filled_directory(target_dir) as directory,
        MetricsLog(
            directory, trackers=start_trackers(config.output.report_to, directory, config.as_flat())
        ) as log,
        display.progress(total_steps) as progress,
    ):
        before = held_out_loss()
        questions = _questions(rows, config.output.sample_prompts)
        answers = [_answer(model, base.tokenizer, questions)]
        progress.start(before)

        def listen(report: StepReport) -> None:
            peak = memory.peak()
            progress.step(report, peak)
            if report.step % config.output.logging_steps == 0 or report.step == total_steps:
                log.write(_metrics(report, peak))

        windows = steps(
            encoded.rows,
            batch_size=training.batch_size,
            accumulation=training.gradient_accumulation_steps,
            num_steps=total_steps,
            seed=training.seed,
            pad_id=pad_id,
        )
        history = train(
            model,
            windows,
            optimizer,
            learning_rate=learning_rates(training, total_steps),
            max_grad_norm=training.max_grad_norm,
            check=check,
            listen=listen,
        )
        after = held_out_loss()
        answers.append(_answer(model, base.tokenizer, questions))
        save_adapter(model, directory)
        copy_tokenizer(base.source.directory, directory)
        run = _record(config, model, encoded, history, (before, after), memory)
        _write_record(run, config, directory)
    display.answers(questions, answers)
    display.result(run, target_dir, config)
    return target_dir


def _resolved(config: RunConfig, base: OpenBase, target_dir: Path) -> RunConfig:
    """The options with everything that `auto` and None stand for on this model and device.

    Errors: `ConfigError` for a length beyond the model's context.
    """
    from dataclasses import replace

    from qlora_kit.base.load import dtype_name
    from qlora_kit.training.optimizer import optimizer_name

    length = config.data.max_length or min(DEFAULT_LENGTH, base.context)
    if length > base.context and not config.data.allow_longer_context:
        raise ConfigError(
            f"max_length {length} is above the model's context of {base.context} tokens",
            "lower it, or give --allow_longer_context",
        )
    dtype, device = dtype_name(base.dtype), str(base.device)
    adapter_dtype = dtype if config.lora.adapter_dtype == "auto" else config.lora.adapter_dtype
    optim = optimizer_name(config.training.optim, base.device)
    return replace(
        config,
        base=replace(config.base, dtype=dtype, device=device),
        data=replace(config.data, max_length=length),
        lora=replace(config.lora, adapter_dtype=adapter_dtype),
        training=replace(config.training, optim=optim),
        output=replace(config.output, output_dir=str(target_dir)),
    )


def _free_name(config: RunConfig) -> str:
    """runs/<model>-<data>-<bits>bit, or the first of -2, -3 ... that is not there."""
    model = Path(config.base.model.rstrip("/")).name
    data = Path(config.data.data.rstrip("/").replace(":", "-")).stem
    name = f"runs/{model}-{data}-{config.base.bits}bit"
    number, free = 1, name
    while Path(free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _few_steps(total_steps: int, num_rows: int, training: TrainingConfig) -> str:
    per_step = training.batch_size * training.gradient_accumulation_steps
    epochs = -(-ENOUGH_STEPS * per_step // num_rows)
    return (
        f"only {total_steps} optimizer steps: --num_train_epochs {epochs} or "
        f"--max_steps {ENOUGH_STEPS} gives {ENOUGH_STEPS}"
    )


def _measure_bits(config: BaseConfig) -> dict[int, dict[str, int]]:
    """Load the base in 16, 8 and 4 bits one after another; bytes by component of each."""
    from dataclasses import replace

    from qlora_kit.base.load import open_base, read_weights
    from qlora_kit.memory.measure import weight_bytes

    measured = {}
    for bits in (16, 8, 4):
        other = replace(config, bits=bits, quant_type=None, double_quant=None)
        measured[bits] = weight_bytes(read_weights(open_base(other)))
    return measured


def _questions(rows: Rows, count: int) -> list[Row]:
    """The first held-out rows that have a prompt and an expected answer."""
    return [row for row in rows.evaluation if "completion" in row.content][:count]


def _answer(model: Any, tokenizer: Any, questions: Sequence[Row]) -> list[str]:
    from qlora_kit.data.prompt import prompt_ids
    from qlora_kit.generation import generate_text

    prompts = [prompt_ids(row.content["prompt"], tokenizer) for row in questions]
    return generate_text(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)


class _Memory:
    """What a run measured of its memory: components while they are there, and the peak."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        from qlora_kit.memory.measure import weight_bytes

        self._model, self._optimizer = model, optimizer
        self._device = model.get_input_embeddings().weight.device
        self._measured = weight_bytes(model)

    def after_backward(self) -> None:
        """Gradients exist only between backward and the optimizer: looked at once."""
        from qlora_kit.memory.measure import adapter_bytes

        if "gradients" not in self._measured:
            self._measured |= adapter_bytes(self._model)

    def peak(self) -> int:
        """The peak so far in bytes."""
        from qlora_kit.memory.measure import peak_bytes

        return peak_bytes(self._device)

    def record(self) -> MemoryRecord:
        """The `memory` part of run.json."""
        from qlora_kit.memory.measure import describe_device, optimizer_bytes

        measured = {**self._measured, **optimizer_bytes(self._optimizer), "peak": self.peak()}
        return {"device": describe_device(self._device), "measured": measured}


def _metrics(report: StepReport, peak: int) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "peak_bytes": peak}


def _record(
    config: RunConfig,
    model: Any,
    encoded: EncodedRows,
    history: Sequence[StepReport],
    losses: tuple[Evaluation | None, Evaluation | None],
    memory: _Memory,
) -> RunRecord:
    from qlora_kit.memory.measure import weight_bytes
    from qlora_kit.training.record import run_record

    seconds = sum(report.seconds for report in history)
    tokens = sum(report.tokens for report in history)
    before, after = losses
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return run_record(
        config=config.as_flat(),
        model={
            "name": model.base_info.name,
            "revision": model.base_info.revision,
            "fingerprint": model.base_info.fingerprint,
            "parameters": model.base_info.parameters,
            "trainable_parameters": trainable,
            "weight_bytes": weight_bytes(model)["weights"],
        },
        data={
            "rows": len(encoded.rows),
            "skipped": sum(encoded.skipped.values()),
            "tokens": encoded.tokens,
            "supervised_tokens": encoded.supervised_tokens,
        },
        train={
            "steps": len(history),
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "first_loss": history[0].loss,
            "last_loss": history[-1].loss,
        },
        evaluation=None
        if before is None or after is None
        else {"loss_before": before.loss, "loss_after": after.loss, "tokens": after.tokens},
        memory=memory.record(),
    )


def _write_record(run: RunRecord, config: RunConfig, directory: Path) -> None:
    from qlora_kit.training.record import model_card, write_json, write_text

    write_text(directory / "config.yaml", dump(config.as_flat()))
    write_json(directory / "run.json", run)
    write_text(directory / "README.md", model_card(run))
