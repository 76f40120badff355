"""What a run leaves beside its weights: `run.json`, `metrics.jsonl`, the model card, the trackers.

A file is there whole or not at all: it is written aside, synced and renamed. Metrics are the
exception, a line a step: what a killed run had reached is on disk, and a resumed run drops
the lines after its checkpoint first. JSON has no NaN or infinity; such a number is written as null.

The card names the base and the data by their last component where they are local paths: it is
published with the adapter, and where things lie on the trainer's disk is nobody else's business.

Left out: what the numbers are (the caller measures) and the trackers themselves (accelerate's).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, Self, TypedDict

import yaml

from qlora_kit.base.source import is_path
from qlora_kit.config.base import DEFAULT_BITS
from qlora_kit.errors import ConfigError, redacted
from qlora_kit.files.atomic import write_file

METRICS_FILE = "metrics.jsonl"
PACKAGES = ("qlora_kit", "torch", "bitsandbytes", "transformers", "accelerate", "safetensors")
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive")},
    **{name: (name,) for name in ("swanlab", "trackio")},
}
"""Accelerate's trackers, and the packages of which each needs one."""


class ModelRecord(TypedDict):
    """The base and the adapters on it."""

    name: str
    revision: str | None
    fingerprint: str
    parameters: int
    trainable_parameters: int
    weight_bytes: int


class DataRecord(TypedDict):
    """The rows trained on; `skipped` rows are not among `rows`.

    `unused` counts the rows that have a field which nothing reads, by its name.
    """

    rows: int
    skipped: int
    tokens: int
    supervised_tokens: int
    unused: dict[str, int]


class TrainRecord(TypedDict):
    """The optimizer steps and what they gave; the rest where it applies.

    `skipped_steps` were not finite, `micro_batch_rows` is what the device was found to hold, and
    `best_step` the one whose adapter was saved.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_s: float
    first_loss: float
    last_loss: float
    skipped_steps: NotRequired[int]
    micro_batch_rows: NotRequired[int]
    best_step: NotRequired[int]


class EvalRecord(TypedDict):
    """Nats a supervised token of the held-out rows, the same rows each time.

    `history` has `step` and `loss` of each evaluation in between.
    """

    loss_before: float
    loss_after: float
    tokens: int
    history: NotRequired[list[dict[str, float]]]


class MemoryRecord(TypedDict):
    """Bytes of tensors by component, `peak` among them; `planned` where there was a plan.

    `phases` has the peak of each phase and its module, `peak_at` phase and module of the largest.
    `process` is the most that the whole process held, which `process_is` says in words: it is not
    to be compared with bytes of tensors.
    """

    device: str
    planned: NotRequired[Mapping[str, int]]
    measured: Mapping[str, int]
    phases: NotRequired[Mapping[str, Mapping[str, Any]]]
    peak_at: NotRequired[str]
    process: NotRequired[int]
    process_is: NotRequired[str]


class RunRecord(TypedDict):
    """What `run.json` holds; `eval` is None where nothing was held out."""

    config: dict[str, Any]
    versions: dict[str, str]
    model: ModelRecord
    data: DataRecord
    train: TrainRecord
    eval: EvalRecord | None
    memory: MemoryRecord


class Tracker(Protocol):
    """The part of accelerate's `GeneralTracker` that is used here."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Take the numbers of one step."""

    def finish(self) -> None:
        """Write out what is held back."""


def run_record(
    *,
    config: Mapping[str, Any],
    model: ModelRecord,
    data: DataRecord,
    train: TrainRecord,
    evaluation: EvalRecord | None,
    memory: MemoryRecord,
) -> RunRecord:
    """What `run.json` holds of a run, with the versions of this process."""
    return {
        "config": dict(config),
        "versions": versions(),
        "model": model,
        "data": data,
        "train": train,
        "eval": evaluation,
        "memory": memory,
    }


def versions() -> dict[str, str]:
    """The installed versions of Python and of what decides a result; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # qlora_kit itself, run from its source
    return found


class MetricsLog:
    """`metrics.jsonl` in `directory`, and the trackers that hear the same numbers.

    A new run begins an empty file. With `resume_step`, the whole lines of an earlier part of the
    run up to that step stay and later or torn ones go. Leaving the context finishes the trackers.
    One that fails is a `note`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        trackers: Sequence[Tracker] = (),
        resume_step: int | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._trackers, self._note = list(trackers), note
        self._closing = contextlib.ExitStack()
        for tracker in trackers:
            self._closing.callback(self._carefully, tracker, tracker.finish)
        path = self._path = Path(directory) / METRICS_FILE
        try:
            write_text(path, _lines_up_to(path, resume_step))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            self._closing.callback(os.close, self._file)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line, then tell the trackers; `step` is the step, if there."""
        line = memoryview((_json(metrics) + "\n").encode("utf-8", errors="backslashreplace"))
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            error.filename = str(self._path)  # the call knows a number only
            raise
        values = {name: value for name, value in metrics.items() if name != "step"}
        for tracker in list(self._trackers):
            log = functools.partial(tracker.log, values, step=metrics.get("step"))
            self._carefully(tracker, log)

    def _carefully(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """A tracker that fails is told no more, and ends no run."""
        if tracker in self._trackers:
            try:
                call()
            except Exception as error:  # each has errors of its own
                self._trackers.remove(tracker)
                name = getattr(tracker, "name", type(tracker).__name__)
                self._note(f"{name} is told no more: {type(error).__name__}: {error}")


def check_trackers(report_to: str) -> list[str]:
    """The trackers in `report_to`, each of them installed; nothing of them is imported.

    Errors: `ConfigError` for one that is unknown or not installed.
    """
    names = [name for part in report_to.split(",") if (name := part.strip())]
    if names in ([], ["none"]):
        return []
    available = {name for name, packages in TRACKERS.items() if any(map(_is_installed, packages))}
    if "accelerate.tracking" in sys.modules:  # the user's own code may have registered some
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        available |= LOGGER_TYPE_TO_CLASS.keys() - TRACKERS.keys()
    if missing := [name for name in names if name not in available]:
        known = ", ".join(sorted(available)) or "none is installed"
        raise ConfigError(
            f"report_to: no tracker {', '.join(missing)} here (available: {known})",
            "install its package (pip install tensorboard, wandb, ...) or leave --report_to out",
        )
    return names


def _is_installed(package: str) -> bool:
    # A folder of that name, such as the one that wandb leaves where it runs, is no package.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def start_trackers(
    report_to: str,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    note: Callable[[str], None] = lambda line: None,
) -> Sequence[Tracker]:
    """Accelerate's trackers named in `report_to` (comma-separated), running; none for `none`.

    Those that keep files keep them in `directory`. `config` is stored with them. One that does not
    start is a `note`. Errors: `ConfigError` for one that is unknown or not installed.
    """
    names = check_trackers(report_to)
    if not names:
        return ()
    from accelerate import Accelerator

    # Trackers take plain values only.
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.items()
    }
    started: list[Tracker] = []
    for name in names:
        accelerator = Accelerator(log_with=[name], project_dir=os.fspath(directory))
        try:
            accelerator.init_trackers("qlora-kit", config=plain)
            started += accelerator.trackers
        except Exception as error:  # each has errors of its own: no login, no network, ...
            note(f"{name} does not start and is left out: {type(error).__name__}: {error}")
    return started


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Replace the file with `value` as JSON; numbers that are not finite become null."""
    write_text(path, _json(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file with `text`, all of it or not at all; a new file's mode is the umask's.

    After a failure the old file is there as it was, and nothing beside it.
    """
    # A file name that is not UTF-8 reaches Python as lone surrogates: they are written as \udcXX,
    # which is also how JSON escapes them.
    write_file(Path(path), text.encode("utf-8", errors="backslashreplace"))


def model_card(run: RunRecord) -> str:
    """The Markdown of the adapter's `README.md`, with the YAML that the hub reads at its head."""
    config, model, data = run["config"], run["model"], run["data"]
    train, memory = run["train"], run["memory"]
    base, targets = _public_name(model["name"]), config.get("target_modules")
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "qlora"]}
    held = {4: f"4 bits, {config.get('quant_type')}", 16: "16 bits, not quantized"}
    if config.get("double_quant"):
        held[4] += ", double quantization"
    bits = config.get("bits", DEFAULT_BITS)
    result = [
        f"training loss: {_number(train['first_loss'])} at the first step, "
        f"{_number(train['last_loss'])} at the last",
        f"speed: {_number(train['tokens_per_s'], '.0f')} tokens/s, "
        f"{_number(train['seconds'], '.0f')} s in all",
        f"peak memory on {_code(memory['device'])}: {_gib(memory['measured'])} measured, "
        f"{_gib(memory.get('planned', {}))} planned",
    ]
    if evaluation := run["eval"]:
        result.insert(
            0,
            f"held-out loss: {_number(evaluation['loss_before'])} before, "
            f"{_number(evaluation['loss_after'])} after, in nats a token over "
            f"{evaluation['tokens']:,} supervised tokens",
        )
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---
# LoRA adapter for {_code(base)}

Trained with qlora-kit. `config.yaml` holds every option, `run.json` every number.

## Training
- base: {_code(base)}, revision {_code(model["revision"] or "none")}, \
held in {held.get(bits, f"{bits} bits")}
- data: {_code(_public_name(str(config.get("data"))))}, {data["rows"]:,} rows \
({data["skipped"]:,} skipped), {data["tokens"]:,} tokens, \
{data["supervised_tokens"]:,} of them supervised
- LoRA: r {config.get("lora_r")}, alpha {config.get("lora_alpha")}, \
dropout {config.get("lora_dropout")}, on \
{_code(", ".join(targets) if isinstance(targets, list) else str(targets))}: \
{model["trainable_parameters"]:,} parameters beside {model["parameters"]:,}
- optimization: {train["steps"]:,} steps, learning rate {config.get("learning_rate")} \
({config.get("lr_scheduler_type")}), seed {config.get("seed")}, \
{config.get("per_device_train_batch_size")} x {config.get("gradient_accumulation_steps")} \
rows a step

## Result
{chr(10).join(f"- {line}" for line in result)}

## Use
`ADAPTER` is the directory of this file.
```
qlora-kit generate --adapter ADAPTER --prompt TEXT
```
```python
{_peft_example(config)}
```
"""


def _peft_example(config: Mapping[str, Any]) -> str:
    """The lines that put the adapter on its base, quantized as it was in training.

    Where the base is says the adapter's own config: the card itself holds no path.
    """
    compute = {"bf16": "bfloat16", "fp16": "float16"}.get(config.get("dtype", ""), "float32")
    settings = {
        4: f"load_in_4bit=True, bnb_4bit_quant_type={config.get('quant_type')!r}, "
        f"bnb_4bit_use_double_quant={bool(config.get('double_quant'))}, "
        f"bnb_4bit_compute_dtype={compute!r}",
        8: "load_in_8bit=True",
    }.get(config.get("bits", DEFAULT_BITS))
    lines = [
        "from peft import PeftConfig, PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig",
        "",
        f"quantization = {f'BitsAndBytesConfig({settings})' if settings else None}",
        'said = PeftConfig.from_pretrained("ADAPTER")',
        'tokenizer = AutoTokenizer.from_pretrained("ADAPTER")',
        "base = AutoModelForCausalLM.from_pretrained(",
        "    said.base_model_name_or_path, revision=said.revision, "
        'dtype="auto", quantization_config=quantization',
        ")",
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
    ]
    if config.get("resize_embeddings"):
        # The new rows are the mean of the others, as transformers draws them but for 1e-9 of it.
        lines.insert(-1, "base.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)")
    return "\n".join(lines)


def _lines_up_to(path: Path, step: int | None) -> str:
    """The whole lines of a metrics file whose step is not after `step`; nothing for None."""
    if step is None or not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn when the run was killed
        reached = metrics.get("step") if isinstance(metrics, dict) else None
        if isinstance(reached, int) and reached <= step:
            kept.append(line + "\n")
    return "".join(kept)


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(_written(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _written(value: Any) -> Any:
    """`value` in plain containers, a number that is not finite as None, texts without tokens."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _public_name(name: str) -> str:
    if is_path(name):
        name = os.path.basename(os.path.abspath(os.path.expanduser(name)))
    return redacted(name)


def _code(text: str) -> str:
    """`text` as inline code that neither ends early nor breaks the line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _number(value: float | None, form: str = ".4f") -> str:
    # A record read back from run.json has None where a number was not finite.
    return format(value, form) if value is not None and math.isfinite(value) else "not finite"


def _gib(components: Mapping[str, int]) -> str:
    return f"{components['peak'] / 1024**3:.2f} GiB" if "peak" in components else "not"
