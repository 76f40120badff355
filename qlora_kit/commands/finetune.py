"""`qlora-kit finetune`: load a base in 4, 8 or 16 bits, train LoRA adapters, save them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.commands.argv import parse
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.output import OutputConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed, refuse_tokens

if TYPE_CHECKING:
    from qlora_kit.base.base import Base
    from qlora_kit.commands.display import Display
    from qlora_kit.data.encode import EncodedRows
    from qlora_kit.data.rows import Rows
    from qlora_kit.data.schedule import StepSchedule
    from qlora_kit.run.prepared import PreparedRun
    from qlora_kit.run.resolve import Start
    from qlora_kit.training.checkpoint import Checkpoint

SUMMARY = "Load a base in 4, 8 or 16 bits, train LoRA adapters on it, save them."
GROUPS = (BaseConfig, DataConfig, LoRAConfig, TrainingConfig, OutputConfig)
QUICKSTART = Path(__file__).resolve().parent.parent / "assets" / "quickstart.yaml"
FEW_STEPS, ENOUGH_STEPS = 20, 50


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parsed = _parse(sys.argv[1:] if argv is None else argv)
    refuse_tokens(parsed)
    config = RunConfig(
        parsed[BaseConfig],
        parsed[DataConfig],
        parsed[LoRAConfig],
        parsed[TrainingConfig],
        parsed[OutputConfig],
    )
    from qlora_kit.commands.display import Display
    from qlora_kit.data.rows import load_rows
    from qlora_kit.run.metrics import check_trackers
    from qlora_kit.run.place import check_place, output_directory
    from qlora_kit.run.resolve import is_gone, start_from_adapter
    from qlora_kit.run.saved_adapter import look_at

    check_trackers(config.output.report_to)
    display = Display()
    if parsed.config_file == str(QUICKSTART):
        display.text_file(QUICKSTART, "no --model, --data or --config: running the quickstart")
    # What paths, headers and first rows show is refused before the libraries below are imported,
    # which takes longer than all of it.
    rows, start = load_rows(config.data, config.training.seed), None
    source = look_at(parsed, None if is_gone(config) else config.lora.adapter)
    if config.output.output_dir is not None:
        check_place(
            config, Path(config.output.output_dir), None if source is None else source.directory
        )
    if config.lora.adapter is not None:
        run_dir = output_directory(config, config.base.bits)
        config, start = start_from_adapter(parsed, config, run_dir)
    from qlora_kit.process.signals import StopSignals
    from qlora_kit.run.run import open_run
    from qlora_kit.training.loop import train

    with StopSignals() as signals:
        plan = prepare(config, rows, display, start)
        if plan is None:
            return 0
        with open_run(plan, display, signals) as run:
            train(
                run.model,
                run.steps(),
                run.optimizer,
                learning_rate=run.learning_rate,
                max_grad_norm=config.training.max_grad_norm,
                run_backward=run.run_backward,
                before_step=run.before_step,
                on_step=run.on_step,
                start_step=run.progress.step,
            )
            run.finish()
    return 0


def _parse(argv: Sequence[str]) -> Parsed:
    parsed = parse("qlora-kit finetune", SUMMARY, GROUPS, argv)
    given = {name for group in GROUPS for name in parsed.given[group]}
    if parsed.config_file is None and not given & {"model", "data", "adapter"}:
        parsed = parse("qlora-kit finetune", SUMMARY, GROUPS, ["--config", str(QUICKSTART), *argv])
    return parsed


def prepare(
    config: RunConfig, rows: Rows, display: Display, start: Start | None = None
) -> PreparedRun | None:
    """Check everything that can be refused without the weights; None for a finished run.

    Nothing is written. Errors: those of the options, the base, the data and the checkpoint,
    `ResourceError` where there is no room for the results.
    """
    from dataclasses import replace

    from qlora_kit.base.load import open_base
    from qlora_kit.data.batch import padding_id, padding_note
    from qlora_kit.data.chat_template import use_template
    from qlora_kit.data.schedule import StepSchedule
    from qlora_kit.run.place import default_names, is_finished, output_directory
    from qlora_kit.run.prepared import PreparedRun
    from qlora_kit.run.resolve import settle
    from qlora_kit.run.resume import (
        check_resumed,
        find_checkpoint,
        identity_of,
        overridden_options,
    )

    base = open_base(config.base)
    target_dir = output_directory(config, base.quantization.bits)
    if is_finished(config, target_dir, base, display):
        return None
    names = None
    if config.output.output_dir is None and config.output.resume_from_checkpoint is None:
        names = default_names(config, base.quantization.bits)
    overridden = overridden_options(config)
    resume = find_checkpoint(config, target_dir, display)
    start_dir, ranks = None, None
    if start is not None:
        config, start_dir, ranks = settle(config, base, start, resume)
        display.note(f"going on with the adapter {config.lora.adapter}")
    config = _resolved(config, base, target_dir)
    _check_adapters(config, base, target_dir, display, ranks)
    if config.data.chat_template is not None:
        use_template(base.tokenizer, config.data.chat_template)
    config = replace(config, data=_chats_of(config.data, rows, base.tokenizer, resume))
    encoded, held_out = _encode(config, rows, base)
    schedule = StepSchedule.of_run(
        encoded.rows, config.data, config.training, padding_id(base.tokenizer)
    )
    display.data(rows, encoded, held_out, schedule.packs)
    if rows.format == "messages":
        display.chats(base.tokenizer, config.data)
    if note := padding_note(base.tokenizer):
        display.note(note)
    identity = identity_of(base, encoded, held_out)
    if resume is not None:
        check_resumed(config, identity, resume, overridden, display)
    total_steps = schedule.num_steps
    if total_steps < FEW_STEPS:
        display.note(_few_steps(schedule))
    if resume is not None and resume.step > total_steps:
        raise ConfigError(
            f"{resume.path} stands after step {resume.step}, and this run has {total_steps}",
            "raise --max_steps or --num_train_epochs",
        )
    from qlora_kit.run.planned import planned_run

    memory = planned_run(config, base, schedule, ranks)
    display.memory(memory)
    if config.output.compare_bits:
        display.bits(_measure_bits(config.base))
    return PreparedRun(
        config,
        base,
        rows,
        encoded,
        held_out,
        schedule,
        target_dir,
        identity,
        resume,
        memory,
        start_dir,
        names,
    )


def _check_adapters(
    config: RunConfig,
    base: Base,
    target_dir: Path,
    display: Display,
    ranks: Mapping[str, int] | None,
) -> None:
    """Refuse targets, rank or a full disk; the base and its adapters are shown.

    `ranks` are those of an adapter to go on with, by linear.
    Errors: `ConfigError`, `ResourceError`.
    """
    import warnings

    from qlora_kit.files.atomic import check_room
    from qlora_kit.lora.targets import check_rank, find_targets
    from qlora_kit.training.checkpoint import SLACK_BYTES
    from qlora_kit.training.optimizer import state_bytes

    lora = config.lora
    targets = find_targets(base.model, lora.target_modules)
    if ranks is None:
        ranks = dict.fromkeys(targets, lora.r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when the adapters are made
            check_rank(base.model, targets, lora.r)
    display.base(base, targets, lora)
    layers = {name: base.model.get_submodule(name) for name in ranks}
    parameters = sum(
        ranks[name] * (one.in_features + one.out_features) for name, one in layers.items()
    )
    # The first checkpoint beside the result: masters, states, and the adapter twice.
    needed = int(parameters * (4 + state_bytes(config.training.optim) + 2 * 4)) + 2 * SLACK_BYTES
    check_room(target_dir, needed, "the first checkpoint with the result")


def _chats_of(
    data: DataConfig, rows: Rows, tokenizer: Any, resume: Checkpoint | None
) -> DataConfig:
    """The data options with the day on which a run's chats are written, the same on resuming.

    Errors: `ConfigError` for what the chat template does not read.
    """
    from dataclasses import replace

    from qlora_kit.data.chat_template import chat_options, check_chat_options, date_of

    check_chat_options(tokenizer, chat_options(data))
    if rows.format != "messages":
        return data
    saved = {} if resume is None else resume.state.get("config")
    kept = saved.get("chat_date") if isinstance(saved, dict) else None
    date = data.chat_date or (kept if isinstance(kept, str) else None)
    return replace(data, chat_date=date_of(tokenizer, date))


def _encode(config: RunConfig, rows: Rows, base: Base) -> tuple[EncodedRows, EncodedRows | None]:
    """The rows that are trained on and held out, as tokens. Errors: `DataError`, `ConfigError`."""
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.outcome import EncodeRules
    from qlora_kit.data.token_cache import cache_directory

    length, rules = config.data.length_in(base.context), EncodeRules.of(config.data)
    cache = cache_directory(config.data.token_cache)
    encoded = encode_rows(rows.train, base.tokenizer, length, rules, cache)
    if rows.evaluation:
        return encoded, encode_rows(rows.evaluation, base.tokenizer, length, rules, cache)
    if config.output.eval_steps:
        raise ConfigError(
            f"eval_steps {config.output.eval_steps} is given, and nothing is held out",
            "give --eval_data or an --eval_fraction, or leave --eval_steps out",
        )
    return encoded, None


def _resolved(config: RunConfig, base: Base, target_dir: Path) -> RunConfig:
    """The options with everything that `auto` and None stand for on this model and device.

    Errors: `ConfigError` for a length beyond the model's context.
    """
    from dataclasses import replace

    from qlora_kit.base.tensors import dtype_name
    from qlora_kit.data.source import lasting
    from qlora_kit.training.optimizer import optimizer_name

    length, held_out = config.data.length_in(base.context), config.data.eval_data
    dtype, device = dtype_name(base.dtype), str(base.device)
    adapter_dtype = dtype if config.lora.adapter_dtype == "auto" else config.lora.adapter_dtype
    optim = optimizer_name(config.training.optim, base.device)
    return replace(
        config,
        base=replace(
            config.base,
            model=config.base.model if base.source.is_portable else base.source.reference,
            bits=base.quantization.bits,
            quant_type=base.quantization.quant_type,
            double_quant=base.quantization.double_quant,
            dtype=dtype,
            device=device,
            resize_embeddings=base.embedding_rows is not None,
        ),
        data=replace(
            config.data,
            data=lasting(config.data.data),
            eval_data=None if held_out is None else lasting(held_out),
            max_length=length,
        ),
        lora=replace(config.lora, adapter_dtype=adapter_dtype),
        training=replace(config.training, optim=optim),
        # How this process began is no part of what the run is.
        output=replace(
            config.output, output_dir=str(target_dir), resume_from_checkpoint=None, override=None
        ),
    )


def _few_steps(schedule: StepSchedule) -> str:
    per_step = schedule.batch_size * schedule.accumulation
    epochs = -(-ENOUGH_STEPS * per_step // schedule.num_sequences)
    return (
        f"only {schedule.num_steps} optimizer steps, in which little is learnt: give "
        f"--num_train_epochs {epochs} or --max_steps {ENOUGH_STEPS} for {ENOUGH_STEPS} of them"
    )


def _measure_bits(config: BaseConfig) -> dict[int, dict[str, int]]:
    """Load the base in 16, 8 and 4 bits one after another; bytes by component of each."""
    from dataclasses import replace

    from qlora_kit.base.load import open_base, read_weights
    from qlora_kit.memory.held import weight_bytes

    measured = {}
    for bits in (16, 8, 4):
        other = replace(config, bits=bits, quant_type=None, double_quant=None)
        measured[bits] = weight_bytes(read_weights(open_base(other)))
    return measured
