"""What the clients are given: adapters trained with the package's commands, and their exports."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.config.export import FORMATS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "qlora_kit" / "assets" / "tiny"
SETTINGS = (
    "--bits 4 --dtype fp32 --batch_size 16 --gradient_accumulation_steps 1 --warmup_steps 5 "
    "--learning_rate 5e-3 --gradient_checkpointing none --eval_steps 0 --max_steps 60"
)


@dataclass(frozen=True)
class Trained:
    """One setting: a base, the data and the targets of an adapter, and the ten prompts."""

    name: str
    base: Path
    data: str
    held_out: Path
    targets: str
    context: int
    more: tuple[str, ...] = ()


def settings() -> list[Trained]:
    """Those that are tried; the ones that read QLORA_KIT_DATA only where that is set."""
    sample = ROOT / "qlora_kit" / "assets" / "samples" / "extract" / "valid.jsonl"
    found = [
        Trained(f"tiny, {said}", TINY, "sample", sample, targets, 512)
        for said, targets in (("all linears", "all-linear"), ("q and v", "auto"))
    ]
    if folder := os.environ.get("QLORA_KIT_DATA"):
        base, rows = Path(folder, "models", "stories260K"), Path(folder, "text", "wikisql")
        more = ("--max_length", "512")
        found.append(
            Trained(
                "stories260K, all linears",
                base,
                str(rows),
                rows / "valid.jsonl",
                "all-linear",
                512,
                more,
            )
        )
    return found


MERGED = ("--merge_base", "dequantized")
EXPORTS = {
    "hf": ("hf", "--dtype", "fp32"),
    "adapter": ("adapter",),
    "hf-4bit": ("hf-4bit",),
    "hf-4bit, merged": ("hf-4bit", *MERGED),
    "hf-8bit": ("hf-8bit",),
    "hf-8bit, merged": ("hf-8bit", *MERGED),
    "gguf, F32": ("gguf", "--dtype", "f32"),
    "gguf, Q8_0": ("gguf", "--dtype", "q8_0"),
    "gguf-lora": ("gguf-lora",),
}
"""Options of `export` by the names that the formats have here."""


def offered() -> list[str]:
    """Those that this version writes."""
    return [name for name, (kind, *_) in EXPORTS.items() if kind in FORMATS]


def trained(one: Trained, folder: Path) -> Path:
    """The directory of the adapter; trained where it is not there."""
    place = folder / "run"
    if not (place / "adapter_config.json").exists():
        command = ["--model", str(one.base), "--data", one.data, "--target_modules", one.targets]
        _command("finetune", *command, *SETTINGS.split(), *one.more, "--output_dir", str(place))
    return place


def exported(name: str, adapter: Path, folder: Path) -> Path:
    """The directory of an export; what the command says last, as a `RuntimeError`, if it cannot."""
    place = folder / name.replace(", ", "-").lower()
    if not (place / "export.json").exists():
        kind, *more = EXPORTS[name]
        arguments = ["--adapter", str(adapter), "--output_dir", str(place), "--format", kind, *more]
        _command("export", *arguments)
    return place


def base_gguf(adapter: Path, folder: Path) -> Path:
    """The base alone as a GGUF file in F32, dequantized as training multiplied by it."""
    place = folder / "base-gguf"
    if not place.exists():
        from qlora_kit import export_model, load_base

        config = json.loads((adapter / "run.json").read_text())["config"]
        base = load_base(config["model"], bits=config["bits"], dtype=config["dtype"])
        export_model(base, place, adapter=None, format="gguf", dtype="f32")
    return file_of(place)


def file_of(place: Path) -> Path:
    """The GGUF file of a directory."""
    (file,) = place.glob("*.gguf")
    return file


def rows_of(one: Trained, count: int) -> list[dict[str, Any]]:
    """Prompts and completions: the first held-out rows with another beginning than those before."""
    rows: dict[str, dict[str, Any]] = {}
    for line in one.held_out.read_text().splitlines():
        row = json.loads(line)
        if len(row["prompt"]) < one.context // 2:
            rows.setdefault(row["prompt"][:24], row)
    taken = list(rows.values())[:count]
    return [{"text": row["prompt"], "completion": row["completion"]} for row in taken]


def _command(name: str, *arguments: str) -> None:
    """Run a command of the package in this process, which has imported what it needs."""
    said = io.StringIO()
    command = importlib.import_module(f"qlora_kit.commands.{name}")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command.main(list(arguments))
    if code in (130, 143):
        raise SystemExit(code)  # stopped by a signal
    if code:
        raise RuntimeError(said.getvalue().strip().splitlines()[-1])
