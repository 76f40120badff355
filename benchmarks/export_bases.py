"""Where an adapter's update is added, and in which form it leaves: distance and loss of each.

Adapters on all linears are trained with the package's own `finetune` on quantized bases of three
trained models of two families: `tiny` and stories260K (Llama), and a Qwen3 that is trained from
random weights first. Each is exported onto the dequantized base and the original one, in every
format that is there, and merged by PEFT into its quantized base; each result is read back and
compared with the model as trained on held-out rows of the task. Both are asked: how far it is from
what was trained, and what loss it has, for the original base could be the better one.

Each case is a process of its own; its result is written when it ends. What was measured already is
not measured again while the settings stay the same; what was not available then is asked for again.
`--work` keeps what is trained.

    OMP_NUM_THREADS=1 python benchmarks/export_bases.py --work DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import make_parser, provenance, write_result

if TYPE_CHECKING:
    from export_parts.distance import Logits, Reference

    from qlora_kit.base.base import Base

DATA = Path(os.environ.get("QLORA_KIT_DATA", ""))
TINY = Path(__file__).resolve().parent.parent / "qlora_kit" / "assets" / "tiny"
PRETRAINING_STEPS = 250
ROWS = 48
"""Held-out rows that are compared."""


@dataclass(frozen=True)
class Task:
    """What an adapter of a model is trained on, and how long."""

    data: str
    steps: int
    batch: int
    learning_rate: float


TASKS = {
    "tiny": Task("sample:extract", 80, 16, 3e-3),
    "stories260K": Task("wikisql", 100, 8, 3e-3),
    "qwen3": Task("sample:query", 100, 16, 3e-3),
}
QUANTIZED = {"nf4": (4, "nf4"), "fp4": (4, "fp4"), "int8": (8, None), "nf4, 10 steps": (4, "nf4")}
"""The bits and the type of each case; the last is what has hardly been trained."""
FORMS: dict[str, dict[str, str]] = {
    "dequantized, bf16": {"format": "hf", "dtype": "bf16"},
    "dequantized, fp32": {"format": "hf", "dtype": "fp32"},
    "original, bf16": {"format": "hf", "merge_base": "original", "dtype": "bf16"},
    "original, fp32": {"format": "hf", "merge_base": "original", "dtype": "fp32"},
    "hf-4bit, unmerged": {"format": "hf-4bit", "merge_base": "none"},
    "hf-4bit, requantized": {"format": "hf-4bit", "merge_base": "dequantized"},
    "hf-8bit, requantized": {"format": "hf-8bit", "merge_base": "dequantized"},
    "gguf f16": {"format": "gguf", "dtype": "f16"},
    "gguf q8_0": {"format": "gguf", "dtype": "q8_0"},
    "gguf q4_0": {"format": "gguf", "dtype": "q4_0"},
}
BASES = ("dequantized, bf16", "original, bf16")
"""What is measured of every case; of the first all forms are."""
PEFT, AS_TRAINED = "PEFT's merge", "as trained"


def base_of(model: str, work: Path) -> Path:
    """The directory of a base; that of the Qwen3 is made where it is not there."""
    if model == "tiny":
        return TINY
    if model == "stories260K":
        return DATA / "models" / model
    made = work / "qwen3"
    if not made.exists():
        from export_parts.pretrain import pretrained

        text = DATA / "text" / "tinyshakespeare" / "input.txt"
        found = pretrained(made, TINY, text, PRETRAINING_STEPS)
        (made / "pretraining.json").write_text(json.dumps(found))
    return made


def trained(model: str, quantized: str, work: Path) -> tuple[Base, dict[str, Any]]:
    """The quantized base of a model with its adapter, and the losses of its training."""
    from qlora_kit.base.load import load_base
    from qlora_kit.library import finetune
    from qlora_kit.lora.adapter import load_adapter

    directory, task = base_of(model, work), TASKS[model]
    bits, quant_type = QUANTIZED[quantized]
    held = {"bits": bits} if quant_type is None else {"bits": bits, "quant_type": quant_type}
    adapter = adapter_of(model, quantized, work)
    if not (adapter / "run.json").exists():
        finetune(
            model=str(directory),
            data=data_of(task),
            output_dir=str(adapter),
            device="cpu",
            dtype="bf16",
            max_steps=10 if "10 steps" in quantized else task.steps,
            batch_size=task.batch,
            gradient_accumulation_steps=1,
            learning_rate=task.learning_rate,
            warmup_steps=5,
            target_modules="all-linear",
            gradient_checkpointing="none",
            overwrite=True,
            **held,
        )
    base = load_base(str(directory), dtype="bf16", device="cpu", **held)
    load_adapter(base, adapter)
    return base, json.loads((adapter / "run.json").read_text())["eval"]


def adapter_of(model: str, quantized: str, work: Path) -> Path:
    return work / f"{model}-{quantized.replace(', ', '-').replace(' ', '-')}"


def data_of(task: Task) -> str:
    return task.data if ":" in task.data else str(DATA / "text" / task.data)


def measure(model: str, quantized: str, names: list[str], work: Path) -> dict[str, Any]:
    """Forms of one trained model, compared with it on the task's held-out rows."""
    from export_parts.distance import Reference, of_model
    from export_parts.peft_merge import merged_by_peft

    from qlora_kit.config.data import DataConfig
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.rows import load_rows

    base, losses = trained(model, quantized, work)
    rows = load_rows(DataConfig(data=data_of(TASKS[model])), 42).evaluation
    reference = Reference(of_model(base.model), encode_rows(rows, base.tokenizer, 512).rows[:ROWS])
    found = {AS_TRAINED: reference.compare(of_model(base.model))}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if name in FORMS:
                found[name] = exported(base, reference, FORMS[name], Path(folder) / "export")
    if PEFT in names:
        bits, quant_type = QUANTIZED[quantized]
        adapter = adapter_of(model, quantized, work)
        merged = merged_by_peft(base.source.directory, adapter, bits, quant_type or "nf4")
        found[PEFT] = reference.compare(of_model(merged))
    positions = sum(len(row.input_ids) - 1 for row in reference.rows)
    return {**losses, "positions": positions, "forms": found}


def exported(
    base: Base, reference: Reference, form: dict[str, str], directory: Path
) -> dict[str, Any]:
    """One form, written and read back; why not, where it cannot be written here."""
    from qlora_kit.errors import QloraKitError
    from qlora_kit.export.export import export_model

    try:
        export_model(base, directory, **form)
    except QloraKitError as error:
        return {"not_available": error.problem}
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"bytes": size, **reference.compare(read_back(base, directory, form))}


def read_back(base: Base, directory: Path, form: dict[str, str]) -> Logits:
    """The logits of an export of `base`, by a reader that fits its format."""
    from export_parts.distance import of_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_kit.base.load import load_base
    from qlora_kit.lora.adapter import load_adapter

    if form["format"] == "gguf":
        (file,) = directory.glob("*.gguf")
        # transformers does not read every field of a config out of a GGUF.
        config = AutoConfig.from_pretrained(base.source.directory, dtype="float32")
        named = {"gguf_file": file.name, "config": config}
        return of_model(AutoModelForCausalLM.from_pretrained(directory, **named))
    if form["format"] == "hf":
        return of_model(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"))
    # bitsandbytes' own matmuls are wrong for some sizes on some CPUs; ours read its files.
    held = load_base(str(directory), dtype="bf16", device="cpu")
    if form["merge_base"] == "none":
        load_adapter(held, directory / "adapter")
    return of_model(held.model)


def run_apart(
    model: str, quantized: str, names: list[str], given: argparse.Namespace
) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--case", model, quantized, *names]
    command += ["--work", str(given.work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{model}, {quantized}: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"model": model, "quantized": quantized, **measured, "commit": provenance()["commit"]}


def shown(case: dict[str, Any]) -> Iterator[str]:
    """The lines of the table of one case."""
    fell = f"held-out loss {case['loss_before']:.3f} -> {case['loss_after']:.3f}"
    yield f"{case['model']}, {case['quantized']}: {fell}, {case['positions']} positions"
    for name, form in case["forms"].items():
        if "not_available" in form:
            yield f"  {name:<20} not available: {form['not_available']}"
            continue
        yield (
            f"  {name:<20} logit error {form['logit_error']:.2e}  KL {form['kl']:.2e}  "
            f"top-1 {form['top1_agreement']:.1%}  largest {form['max_logit_difference']:.3g}  "
            f"loss {form['loss']:.4f}"
        )
    yield f"  PEFT's merge is {times_peft(case):.1f} times as far as ours in bf16"


def times_peft(case: dict[str, Any]) -> float:
    """The logit error of PEFT's merge over that of the plain bf16 export."""
    forms = case["forms"]
    return float(forms[PEFT]["logit_error"] / forms["dequantized, bf16"]["logit_error"])


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "export_bases")
    parser.add_argument("--models", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--quantized", nargs="+", default=[*QUANTIZED], choices=QUANTIZED)
    parser.add_argument("--work", type=Path, help="keep here what is trained")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    kept = given.work is not None
    given.work = given.work or Path(tempfile.mkdtemp())
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        if given.case:
            model, quantized, *names = given.case
            print(json.dumps(measure(model, quantized, names, given.work)))
            return
        settings = {
            "tasks": {name: asdict(task) for name, task in TASKS.items()},
            "pretraining_steps": PRETRAINING_STEPS,
            "rows": ROWS,
        }
        path = given.results / f"{given.result}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        same = all(before.get(name) == value for name, value in settings.items())
        cases: list[dict[str, Any]] = before["cases"] if same else []
        done = {(case["model"], case["quantized"]): case for case in cases}
        for quantized, model in itertools.product(given.quantized, given.models):
            old = done.get((model, quantized), {"forms": {}})
            forms = old["forms"]
            wanted = FORMS if quantized == "nf4" else BASES
            names = [name for name in (*wanted, PEFT) if "loss" not in forms.get(name, {})]
            if not names:
                continue
            case = run_apart(model, quantized, names, given)
            case["forms"] = {**forms, **case["forms"]}
            cases = [one for one in cases if one is not old] + [case]
            print("\n".join(shown(case)), flush=True)
            write_result(given, {**settings, "cases": cases})
        print(path)
    finally:
        if not kept:
            shutil.rmtree(given.work)


if __name__ == "__main__":
    main()
