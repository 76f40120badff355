"""What a run is: frozen dataclasses, and the one place where an option is written.

How one is declared stands in `options.py`. A check here needs no model; what needs one is checked
when the model's headers are known. Every number has a largest value here, whatever a run could do
with a larger one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import typing
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ConfigError
from qlora_kit.options.option import (
    FALSE,
    TRUE,
    Options,
    a_name,
    a_size,
    also,
    as_flat,
    between,
    joined,
    one_of,
    option,
    size_bytes,
)

QUANT_TYPES = ("nf4", "fp4")
DTYPES = ("bf16", "fp16", "fp32")
OPTIMIZERS = (
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
)
SCHEDULES = ("cosine", "linear", "constant")
DATA_FORMATS = ("auto", "text", "prompt", "instruction", "messages")
LONG_ROWS = ("truncate", "drop", "error")
RECOMPUTE_LEVELS = ("none", "selective", "full")
DEFAULT_EVAL_FRACTION = 0.05
DEFAULT_LENGTH = 1024
OTHER_BASE_HELP = "use the adapter on a base with other weights than it was trained on"
LARGEST_ALPHA = 1e9
LARGEST_RANK = 2**16
"""As `lora/peft_config.py` takes it from an adapter; far above it a scale is no fp32 number."""
MOST_ROWS, MOST_STEPS, MOST_TOKENS = 2**16, 10**9, 10**7
"""Of rows at a time, of steps of a run, and of tokens in a row: far above what any run has."""
MOST_DRAWN = 10**6
"""Of tokens that are generated."""
SEEDS = between(0, 2**63 - 1)

_not_empty = a_name()


def _not_empty_names(value: str | tuple[str, ...]) -> str | None:
    names = value.split(",") if isinstance(value, str) else value
    return None if all(name.strip() for name in names) and names else "names of options"


def _device(value: str) -> str | None:
    return (
        None if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value) else "auto, cpu, cuda or cuda:N"
    )


def _day(value: str) -> str | None:
    try:
        good = datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        good = False
    # A C library may refuse to write years before 1900.
    return None if good and value >= "1900" else "a day as 2026-01-31"


def assignments(text: str) -> dict[str, Any]:
    """`enable_thinking=false,effort=high` as {name: value}; a value is JSON, else text.

    Errors: `ValueError`.
    """
    values: dict[str, Any] = {}
    # A comma inside JSON is none between two variables: one that a name and "=" follow is.
    for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or name in values:
            raise ValueError("NAME=VALUE, separated by commas, each name once")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            lower = value.lower()
            values[name] = {"true": True, "false": False, "none": None}.get(lower, value)
    return values


def _assignments(value: str) -> str | None:
    try:
        assignments(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class BaseConfig(Options):
    """Which base model, and how it is held."""

    model: str = option(
        "tiny",
        "local directory, hub id or short name (tiny ships with the package; llama-7b, "
        "llama3.1-8b, mistral-7b, ... stand for hub ids)",
        aliases=("model_name_or_path",),
        check=_not_empty,
        path=True,
        metavar="NAME|DIR",
    )
    revision: str | None = option(
        None,
        "hub revision: branch, tag or commit",
        check=a_name("a branch, tag or commit"),
        metavar="REV",
    )
    bits: int | None = option(
        None,
        "bits of the base's linear layers; 16: not quantized",
        check=one_of(4, 8, 16),
        shown_default="4, or what the base is already quantized in",
    )
    quant_type: str | None = option(
        None, "4-bit format", check=one_of(*QUANT_TYPES), shown_default="nf4"
    )
    double_quant: bool | None = option(
        None, "quantize the 4-bit scales as well", shown_default="on"
    )
    dtype: str = option(
        "auto",
        "compute dtype; auto: bf16 where the device has it, else fp16 (GPU) or fp32",
        check=one_of("auto", *DTYPES),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", check=_device)
    resize_embeddings: bool = option(
        False,
        "where the tokenizer has more tokens than the embedding has rows, add rows: each the mean "
        "of the others, and frozen like them",
    )

    chosen: typing.ClassVar[frozenset[str]] = frozenset()
    """Of `bits`, `quant_type` and `double_quant` those that were given and not left alone."""

    def _conflicts(self) -> typing.Iterator[str]:
        names = ("bits", "quant_type", "double_quant")
        given = frozenset(name for name in names if getattr(self, name) is not None)
        object.__setattr__(self, "chosen", given)
        object.__setattr__(self, "bits", self.bits or 4)
        if self.bits == 4:
            object.__setattr__(self, "quant_type", self.quant_type or QUANT_TYPES[0])
            object.__setattr__(self, "double_quant", self.double_quant is not False)
            return
        for name in ("quant_type", "double_quant"):
            if getattr(self, name) is not None:
                yield (
                    f"{name} {getattr(self, name)} goes with bits 4 (nf4 or fp4, double_quant on "
                    f"or off), not with bits {self.bits}"
                )


@dataclass(frozen=True)
class DataConfig(Options):
    """Which rows, and how they become tokens."""

    data: str = option(
        "sample",
        ".jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file (.gz too), several with commas, "
        "a pattern of them, directory with train.* and valid.* or from save_to_disk, hub id "
        "(owner/name or owner/name:subset), or sample:NAME from the package",
        aliases=("dataset",),
        check=_not_empty,
        reads=joined,
        path=True,
        metavar="FILE|DIR",
    )
    eval_data: str | None = option(
        None,
        "held-out rows; else the directory's valid.*, else its test.*, else a share",
        check=_not_empty,
        reads=joined,
        path=True,
        metavar="FILE",
    )
    eval_fraction: float | None = option(
        None,
        "share of the rows held out where there is no other held-out file; 0: no evaluation",
        check=between(0, 1, open_high=True),
        shown_default=str(DEFAULT_EVAL_FRACTION),
    )
    format: str = option("auto", "shape of the rows", check=one_of(*DATA_FORMATS))
    max_row_size: str = option("16MiB", "a longer row is an error", check=a_size, metavar="SIZE")
    columns: str | None = option(
        None,
        "other names of the rows' fields: question=prompt,answer=completion",
        check=_not_empty,
        metavar="NAME=FIELD,...",
    )
    instruction_as_chat: bool = option(
        False, "Alpaca's rows go through the chat template, not into Alpaca's own form"
    )
    chat_template: str | None = option(
        None,
        "chat template for rows of messages: chatml, llama-2, llama-3, alpaca, plain, or a file; "
        "saved with the adapter",
        check=_not_empty,
        path=True,
        metavar="NAME|FILE",
        shown_default="the model's own",
    )
    chat_template_args: str | None = option(
        None,
        "variables of the chat template, comma-separated: enable_thinking=false",
        check=_assignments,
        metavar="NAME=VALUE,...",
    )
    chat_date: str | None = option(
        None,
        "day that a chat template writes where it asks for today's; kept with the run",
        check=_day,
        metavar="YYYY-MM-DD",
        shown_default="today",
    )
    merge_system: bool = option(
        False, "put a system message before the first user's where the chat template takes none"
    )
    train_on: str = option(
        "all", "assistant turns of a chat that are trained on", check=one_of("all", "last")
    )
    train_on_prompt: bool = option(False, "supervise the prompt as well")
    literal_control_tokens: bool = option(
        False,
        "control tokens spelled in rows of text, prompt and completion are characters, not tokens",
    )
    long_rows: str = option(
        "truncate",
        "rows of more than --max_length tokens: truncate (a prompt loses its beginning, a chat its "
        "last turns, a text becomes several rows), drop, or error",
        check=one_of(*LONG_ROWS),
    )
    max_length: int | None = option(
        None,
        "tokens per row",
        aliases=("max_seq_length",),
        check=between(2, MOST_TOKENS),
        shown_default=f"{DEFAULT_LENGTH}, or the model's context where that is shorter",
    )
    allow_longer_context: bool = option(False, "let --max_length exceed the model's context")
    packing: bool = option(
        False, "fill sequences of --max_length with several rows, isolated from each other"
    )
    group_by_length: bool = option(
        False, "put rows of like length into a batch: less padding, a less random order"
    )
    token_cache: str | None = option(
        None,
        "where tokens are kept between runs; none: nowhere",
        check=_not_empty,
        path=True,
        shown_default="~/.cache/qlora_kit/tokens",
        metavar="DIR|none",
    )

    def length_in(self, context: int) -> int:
        """Tokens per row on a model made for `context` tokens; `ConfigError` for more than that."""
        length = self.max_length or min(DEFAULT_LENGTH, context)
        if length > context and not self.allow_longer_context:
            raise ConfigError(
                f"max_length {length} is above the model's context of {context} tokens",
                "lower it, or give --allow_longer_context",
            )
        return length

    def _conflicts(self) -> typing.Iterator[str]:
        if self.eval_data is not None and self.eval_fraction is not None:
            yield (
                f"eval_fraction {self.eval_fraction:g} is given beside eval_data {self.eval_data}: "
                "name one of them"
            )
        if self.packing and self.group_by_length:
            yield "packing and group_by_length are given: packs have one length, name one of them"


@dataclass(frozen=True)
class LoRAConfig(Options):
    """The adapters: rank, scale and place."""

    r: int = option(16, "rank", flag="lora_r", check=between(1, LARGEST_RANK))
    alpha: float = option(
        32.0,
        "the update is scaled by alpha / r",
        flag="lora_alpha",
        check=between(0, LARGEST_ALPHA, open_low=True, tiny=1e-6),
    )
    dropout: float = option(
        0.0, "dropout before lora_A", flag="lora_dropout", check=between(0, 1, open_high=True)
    )
    target_modules: str | tuple[str, ...] = option(
        "auto",
        "auto (query and value projections), all-linear, comma-separated names, or a regex",
        check=lambda value: None if value else "auto, all-linear, names or a regex",
        metavar="NAMES",
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    adapter_dtype: str = option(
        "auto",
        "dtype that adapters are computed and saved in (auto: the compute dtype); masters are fp32",
        check=one_of("auto", *DTYPES),
    )
    adapter: str | None = option(
        None,
        "go on training this adapter, ours or PEFT's; rank, scale and targets are its own",
        check=_not_empty,
        path=True,
        metavar="DIR",
    )
    adapter_fingerprint: str | None = option(
        None,
        "SHA-256 that the weights of --adapter must have; a run's config.yaml holds it",
        check=lambda value: None if re.fullmatch("[0-9a-f]{64}", value) else "64 hex digits",
        metavar="SHA256",
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.adapter is None:
            if self.adapter_fingerprint is not None:
                yield "adapter_fingerprint goes with adapter, which is not given"
            if self.allow_other_base:
                yield "allow_other_base goes with adapter, which is not given"


@dataclass(frozen=True)
class TrainingConfig(Options):
    """The optimization."""

    learning_rate: float = option(
        2e-4, "peak learning rate", check=between(0, 1e3, open_low=True, tiny=1e-12)
    )
    lr_scheduler_type: str = option("cosine", "after the warm-up", check=one_of(*SCHEDULES))
    warmup_steps: float = option(
        0.03,
        "steps of linear warm-up; below 1: a share of all steps",
        aliases=("warmup_ratio",),
        check=between(0, MOST_STEPS),
    )
    weight_decay: float = option(0.0, "decoupled weight decay", check=between(0, 1e3))
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm", check=between(0, 1e9, open_low=True, tiny=1e-9)
    )
    optim: str = option(
        "auto",
        "auto: paged_adamw_8bit on CUDA, adamw (torch's fused) elsewhere",
        check=one_of("auto", *OPTIMIZERS),
    )
    batch_size: int = option(
        1,
        "rows of a micro-batch",
        flag="per_device_train_batch_size",
        aliases=("batch_size",),
        check=between(1, MOST_ROWS),
    )
    gradient_accumulation_steps: int = option(
        16, "micro-batches of a step", check=between(1, MOST_ROWS)
    )
    num_train_epochs: float = option(1.0, "passes over the data", check=between(0, 1e6))
    max_steps: int | None = option(
        None,
        "stop after this many optimizer steps",
        check=between(0, MOST_STEPS),
        reads=also({"-1": None}),
    )
    gradient_checkpointing: str = option(
        "auto",
        "activations that backward recomputes; auto: as few as fit --memory_budget",
        check=one_of("auto", *RECOMPUTE_LEVELS),
        reads=also(dict.fromkeys(FALSE, "none")),
    )
    memory_budget: str | None = option(
        None,
        "bytes that the run may take of its device, such as 8GiB",
        check=a_size,
        metavar="SIZE",
        shown_default="the device's free memory",
    )
    own_blocks: bool = option(
        True, "norms, rotary turns and MLPs that keep less for the backward pass, same numbers"
    )
    seed: int = option(42, "of adapters, data order, dropout and sampling", check=SEEDS)

    @property
    def budget_bytes(self) -> int | None:
        """`memory_budget` as a number, where it is given."""
        return None if self.memory_budget is None else size_bytes(self.memory_budget)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.num_train_epochs == 0 and not self.max_steps:
            yield (
                f"num_train_epochs 0 with max_steps {self.max_steps or 0} leaves no step to train"
            )
        elif self.max_steps == 0:
            yield "max_steps 0 leaves no step to train: leave it out, or give at least 1"


@dataclass(frozen=True)
class OutputConfig(Options):
    """Where the results go, and what is reported."""

    output_dir: str | None = option(
        None,
        "new or empty directory for the results",
        check=_not_empty,
        path=True,
        shown_default="runs/<model>-<data>-<bits>bit, then -2, -3 ...",
        metavar="DIR",
    )
    overwrite: bool = option(
        False, "replace what is in --output_dir", aliases=("overwrite_output_dir",)
    )
    save_steps: int = option(
        0,
        "write a checkpoint every so many steps",
        check=between(0, MOST_STEPS),
        shown_default="0: by the clock alone, and when a signal or an error stops the run",
    )
    save_minutes: float = option(
        10.0,
        "write a checkpoint after so many minutes without one; a finished run keeps none of them; "
        "0: none",
        check=between(0, 10**6),
    )
    save_total_limit: int = option(2, "checkpoints that are kept", check=between(1, MOST_STEPS))
    eval_steps: int = option(
        0,
        "held-out loss every so many steps",
        check=between(0, MOST_STEPS),
        shown_default="0: at the start and the end",
    )
    logging_steps: int = option(
        1, "a line in metrics.jsonl every so many steps", check=between(1, MOST_STEPS)
    )
    load_best: bool = option(False, "save the adapter of the lowest held-out loss, not the last")
    early_stopping: int | None = option(
        None,
        "stop after this many evaluations without a lower held-out loss",
        check=between(1, MOST_STEPS),
    )
    resume_from_checkpoint: str | None = option(
        None,
        "auto (the newest whole checkpoint of --output_dir) or the directory of a checkpoint",
        check=a_name("auto or the directory of a checkpoint"),
        path=True,
        reads=also(dict.fromkeys(TRUE, "auto") | dict.fromkeys(FALSE)),
        metavar="auto|DIR",
    )
    override: str | tuple[str, ...] | None = option(
        None,
        "options, comma-separated, that may differ from those of the checkpoint",
        check=_not_empty_names,
        metavar="NAMES",
    )
    report_to: str = option(
        "none",
        "trackers of accelerate: tensorboard, wandb, ... (comma-separated)",
        check=a_name("none, or names of trackers with commas between them"),
        reads=joined,
        metavar="NAMES",
    )
    sample_prompts: int = option(
        0, "answer this many held-out prompts before and after training", check=between(0, 100)
    )
    compare_bits: bool = option(
        False, "first load the base in 16, 8 and 4 bits and show the memory of each"
    )

    @property
    def overridden(self) -> frozenset[str]:
        """The names in `override`, hyphens as underscores."""
        names = self.override.split(",") if isinstance(self.override, str) else self.override or ()
        return frozenset(name.strip().lstrip("-").replace("-", "_") for name in names)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.eval_steps == 0:
            if self.load_best:
                yield "load_best needs eval_steps of at least 1, got 0"
            if self.early_stopping is not None:
                yield f"early_stopping {self.early_stopping} needs eval_steps of at least 1, got 0"
        if self.resume_from_checkpoint is None and self.override is not None:
            yield "override goes with resume_from_checkpoint, which is not given"
        if self.resume_from_checkpoint is not None and self.overwrite:
            yield (
                f"overwrite is given beside resume_from_checkpoint {self.resume_from_checkpoint}: "
                "name one of them"
            )


@dataclass(frozen=True)
class RunConfig:
    """What `finetune` runs: one of each group of options."""

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    def as_flat(self) -> dict[str, Any]:
        """`{option name: value}` of every option that applies, in the order of `--help`.

        An option that is left alone and has no value (None) is absent.
        """
        groups = (self.base, self.data, self.lora, self.training, self.output)
        return {name: value for group in groups for name, value in as_flat(group).items()}


@dataclass(frozen=True)
class ExportConfig(Options):
    """What to export, in which form, and how it is verified."""

    adapter: str | None = option(
        None, "directory of the adapter", check=_not_empty, path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    output_dir: str | None = option(
        None, "new or empty directory for the model", check=_not_empty, path=True, metavar="DIR"
    )
    overwrite: bool = option(False, "replace what is in --output_dir")
    format: str = option(
        "hf",
        "what to write: hf, a plain model; adapter, the adapter alone, for others to use",
        check=one_of("hf", "adapter"),
    )
    base_name: str | None = option(
        None,
        "name of the base for those who get the result, such as its hub id: a path of this machine "
        "means nothing to them",
        check=_not_empty,
        metavar="OWNER/NAME",
        shown_default="the name that the adapter has",
    )
    merge_base: str = option(
        "dequantized",
        "add the update to the weights that training multiplied by, or to the original ones",
        check=one_of("dequantized", "original"),
    )
    export_dtype: str = option(
        "auto",
        "dtype of the export; auto: the compute dtype of the run",
        flag="dtype",
        check=one_of("auto", *DTYPES),
    )
    shard_size: int = option(
        4 * 1024**3,
        "largest size of one file in bytes",
        check=between(1024**2, 1024**5),
        metavar="BYTES",
    )
    verify: str | None = option(
        None,
        "file to verify on",
        shown_default="the run's own held-out rows, else the sample",
        check=_not_empty,
        path=True,
        metavar="FILE",
    )
    max_kl: float | None = option(
        None, "a larger divergence from the model as trained is an error", check=between(0, 1e6)
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.format == "adapter":
            plain = {"merge_base": "dequantized", "dtype": "auto", "verify": None, "max_kl": None}
            given = (self.merge_base, self.export_dtype, self.verify, self.max_kl)
            for (name, default), value in zip(plain.items(), given, strict=True):
                if value != default:
                    yield f"{name} {value} goes with format hf, which merges, not with adapter"


def _stops(value: str | tuple[str, ...]) -> str | None:
    return None if value and all(value) else "texts that are not empty"


@dataclass(frozen=True)
class GenerateConfig(Options):
    """What to generate from, and how tokens are drawn."""

    adapter: str | None = option(
        None, "directory of an adapter", check=_not_empty, path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    prompt: str | None = option(
        None,
        "the text to go on from; -, or nothing where text is piped in: from standard input, "
        "without its last line end",
        metavar="TEXT|-",
    )
    prompts: str | None = option(
        None,
        ".jsonl, .json or .csv file of rows with a prompt, or .txt with one a line; answers are "
        "printed as JSON lines, each beside its row",
        check=_not_empty,
        path=True,
        metavar="FILE",
    )
    batch_size: int = option(8, "rows of --prompts at a time", check=between(1, MOST_ROWS))
    max_new_tokens: int = option(128, "stop after this many tokens", check=between(1, MOST_DRAWN))
    stop: str | tuple[str, ...] | None = option(
        None,
        "end an answer before this text; give it again for another",
        check=_stops,
        repeated=True,
        metavar="TEXT",
    )
    temperature: float = option(
        0.0, "0: always the likeliest token", check=between(0, 100, tiny=1e-6)
    )
    top_p: float = option(
        1.0,
        "draw from the likeliest tokens that make up this share",
        check=between(0, 1, open_low=True, tiny=1e-6),
    )
    top_k: int = option(
        0,
        "draw from this many of the likeliest tokens",
        check=between(0, 10**6),
        shown_default="0: from all",
    )
    repetition_penalty: float = option(
        1.0,
        "divide the logits of tokens that were there, where they are positive, by this (else "
        "multiply)",
        check=between(0.01, 100),
    )
    seed: int = option(42, "of the drawing", check=SEEDS)
    chat: bool = option(False, "put each prompt into the model's chat template")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    def _conflicts(self) -> typing.Iterator[str]:
        if self.prompt is not None and self.prompts is not None:
            yield f"prompt is given beside prompts {self.prompts}: name one of them"


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """What to evaluate, and what is shown of it."""

    adapter: str | None = option(
        None, "directory of an adapter", check=_not_empty, path=True, metavar="DIR"
    )
    allow_other_base: bool = option(False, OTHER_BASE_HELP)
    exact_match: bool = option(
        True,
        "answer every prompt greedily, and count the answers that equal the completion; of a row "
        "of messages, its last trained turn",
    )
    generate: int = option(
        0, "show this many answers beside the expected ones", check=between(0, 10**6)
    )
    max_new_tokens: int = option(128, "longest answer in tokens", check=between(1, MOST_DRAWN))
    batch_size: int = option(
        8, "rows at a time", aliases=("per_device_eval_batch_size",), check=between(1, MOST_ROWS)
    )
    seed: int = option(42, "of the share that --eval_fraction draws, as in finetune", check=SEEDS)
    json: bool = option(False, "print one JSON object and nothing else")

    def _conflicts(self) -> typing.Iterator[str]:
        if self.generate and not self.exact_match:
            yield f"generate {self.generate} shows answers, and exact_match is off: name one"


@dataclass(frozen=True)
class ShowConfig(Options):
    """What is shown of the data."""

    rows: int = option(3, "show this many rows, token by token", check=between(0, 10**4))
    batch_size: int = option(
        8,
        "rows of a batch, for the share of padding",
        aliases=("per_device_train_batch_size",),
        check=between(1, MOST_ROWS),
    )
    seed: int = option(42, "of the order and of the share held out, as in finetune", check=SEEDS)
    json: bool = option(False, "print one JSON object and nothing else")
    html: str | None = option(
        None, "also write a page to share", check=_not_empty, path=True, metavar="FILE"
    )


@dataclass(frozen=True)
class PlanConfig(Options):
    """What is planned for, and what is shown of it."""

    max_length: int | None = option(
        None,
        "tokens per row, all trained on",
        aliases=("max_seq_length",),
        check=between(2, MOST_TOKENS),
        shown_default=f"{DEFAULT_LENGTH}, or the model's context where that is shorter",
    )
    packing: bool = option(False, "rows hold several shorter ones, isolated from each other")
    device_memory: str | None = option(
        None,
        "memory of the card that is planned for, such as 8GiB",
        check=a_size,
        metavar="SIZE",
        shown_default="what is free here",
    )
    grid: bool = option(False, "also the peak over batch sizes and lengths")
    json: bool = option(False, "print one JSON object and nothing else")
