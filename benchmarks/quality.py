"""Held-out loss after equal training at 16, 8 and 4 bits, ours and PEFT's, over several seeds.

Ours is the real command; its losses come from each run's `run.json`. PEFT's is `peers/peft_guide`,
on the same batches in the same order, from the same A, with the same optimizer, rate and clipping.
Each run is a process of its own, is written to the result when it ends, and is not repeated while
the settings stay the same. The plot needs matplotlib; without it the table alone is written.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --jobs 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from record import make_parser, provenance, write_result

if TYPE_CHECKING:
    from peers.peft_guide import Peer

    from qlora_kit.data.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "qlora_kit" / "assets" / "tiny"
SIDES = ("ours", "peft")
TARGETS = ("auto", "all-linear")
BITS = (16, 8, 4)
RANK, BATCH, LENGTH = 16, 8, 512
LEARNING_RATE = 2e-3
KEY = ("side", "bits", "targets", "seed")


def settings(steps: int) -> str:
    """The command's options that all runs have in common."""
    return (
        f"--batch_size {BATCH} --gradient_accumulation_steps 1 --max_steps {steps} "
        f"--learning_rate {LEARNING_RATE} --lr_scheduler_type constant --warmup_steps 0 "
        f"--optim adamw --weight_decay 0 --max_grad_norm 1 --max_length {LENGTH} --lora_r {RANK} "
        f"--lora_alpha {2 * RANK} --lora_dropout 0 --gradient_checkpointing none --dtype bf16"
    )


def losses_of_ours(case: argparse.Namespace, directory: Path) -> tuple[float, float]:
    """Train with the command; held-out loss before and after, in nats a supervised token."""
    command = [sys.executable, "scripts/finetune.py", "--model", str(TINY), "--data", case.data]
    command += [*settings(case.steps).split(), "--bits", str(case.bits[0]), "--device", "cpu"]
    command += ["--target_modules", case.targets[0], "--seed", str(case.seeds[0])]
    command += ["--sample_prompts", "0", "--output_dir", str(directory / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads((directory / "run" / "run.json").read_text())["eval"]
    return found["loss_before"], found["loss_after"]


def losses_of_peft(case: argparse.Namespace) -> tuple[float, float]:
    """The same with PEFT as its guide says."""
    from peers.peft_guide import QUERY_AND_VALUE, Peer

    from qlora_kit.base.open import open_base
    from qlora_kit.config.base import BaseConfig
    from qlora_kit.config.data import DataConfig
    from qlora_kit.data.batch import eval_batches, padding_id
    from qlora_kit.data.encode import encode_rows
    from qlora_kit.data.rows import load_rows
    from qlora_kit.data.schedule import StepSchedule

    bits, targets, seed = case.bits[0], case.targets[0], case.seeds[0]
    tokenizer = open_base(BaseConfig(model=str(TINY), bits=16, device="cpu")).tokenizer
    rows = load_rows(DataConfig(data=case.data), seed)
    train = encode_rows(rows.train, tokenizer, LENGTH).rows
    pad = padding_id(tokenizer)
    held_out = list(eval_batches(encode_rows(rows.evaluation, tokenizer, LENGTH).rows, BATCH, pad))
    peer = Peer(
        TINY,
        bits,
        "none",
        RANK,
        "cpu",
        targets=QUERY_AND_VALUE if targets == "auto" else targets,
        learning_rate=LEARNING_RATE,
    )
    copy_first_adapters(peer.model, targets, seed)
    before = held_out_loss(peer, held_out)
    for (batch,) in StepSchedule(
        rows=train, batch_size=BATCH, num_steps=case.steps, seed=seed, pad_id=pad
    ):
        peer.step(batch["input_ids"], batch["labels"])
    return before, held_out_loss(peer, held_out)


def copy_first_adapters(model: Any, targets: str, seed: int) -> None:
    """Give PEFT's model the A that `finetune --seed` draws; B is zero in both."""
    from qlora_kit.base.load import load_base
    from qlora_kit.config.lora import LoRAConfig
    from qlora_kit.lora.inject import inject_lora, lora_layers

    ours = load_base(str(TINY), bits=16, device="cpu").model
    inject_lora(ours, LoRAConfig(r=RANK, alpha=2 * RANK, target_modules=targets), seed=seed)
    theirs = dict(model.named_parameters())
    layers = lora_layers(ours)
    assert len(layers) == sum(".lora_A." in name for name in theirs), "other targets"
    for name, layer in layers.items():
        drawn = layer.lora_A["default"].weight.data
        theirs[f"base_model.model.{name}.lora_A.default.weight"].data.copy_(drawn)


def held_out_loss(peer: Peer, batches: list[Batch]) -> float:
    """Minus the log-probability of all supervised tokens divided by their number."""
    total, tokens = 0.0, 0
    # Not in eval(): bitsandbytes 0.50 repacks 4-bit weights there on some CPUs, and what is
    # trained after that has wrong gradients. Without dropout the modes compute the same.
    with torch.no_grad():
        for batch in batches:
            count = batch["num_supervised"]
            total += float(peer.loss(batch["input_ids"], batch["labels"])) * count
            tokens += count
    return total / tokens


def run_apart(case: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own; the case with its losses."""
    command = [sys.executable, __file__, "--side", case["side"], "--bits", str(case["bits"])]
    command += ["--targets", case["targets"], "--seeds", str(case["seed"])]
    command += ["--steps", str(given.steps), "--data", given.data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    before, after = json.loads(done.stdout.splitlines()[-1])
    return {**case, "loss_before": before, "loss": after}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours and PEFT's by bits and targets: mean, lowest and highest loss over the seeds.

    `difference` is ours less PEFT's, the mean over the seeds that both were run with.
    """
    rows = []
    for bits, targets in itertools.product(BITS, TARGETS):
        by_side = {
            side: {
                run["seed"]: run["loss"]
                for run in runs
                if (run["side"], run["bits"], run["targets"]) == (side, bits, targets)
            }
            for side in SIDES
        }
        ours, peft = by_side["ours"], by_side["peft"]
        if not ours:
            continue
        row: dict[str, Any] = {"bits": bits, "targets": targets, "seeds": sorted(ours)}
        row |= {"mean": mean(ours.values()), "range": [min(ours.values()), max(ours.values())]}
        if peft:
            row["peft_mean"] = mean(peft.values())
            row["peft_range"] = [min(peft.values()), max(peft.values())]
        if both := sorted(ours.keys() & peft.keys()):
            row["difference"] = mean(ours[seed] - peft[seed] for seed in both)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("bits  targets     ours   (range)          PEFT   (range)          ours - PEFT")
    for row in rows:
        cells = []
        for name in ("", "peft_"):
            if f"{name}mean" in row:
                low, high = row[f"{name}range"]
                cells.append(f"{row[f'{name}mean']:.3f}  ({low:.3f}-{high:.3f})")
        if "difference" in row:
            cells.append(f"{row['difference']:+.3f}")
        print(f"{row['bits']:>4}  {row['targets']:<10}  " + "    ".join(cells))


def plot(runs: list[dict[str, Any]], path: Path, steps: int) -> bool:
    """Every seed as a point, the mean as a line, a panel for each choice of targets.

    False, and no file, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(TARGETS))
    for panel, targets in zip(panels, TARGETS, strict=True):
        for side, shift, colour in (("ours", -0.14, "tab:blue"), ("peft", 0.14, "tab:orange")):
            named = {"ours": "qlora_kit", "peft": "PEFT + bitsandbytes"}[side]
            for place, bits in enumerate(BITS):
                losses = [
                    run["loss"]
                    for run in runs
                    if (run["side"], run["bits"], run["targets"]) == (side, bits, targets)
                ]
                if losses:
                    x = place + shift
                    panel.vlines(x, min(losses), max(losses), color=colour, alpha=0.5)
                    panel.scatter([x] * len(losses), losses, color=colour, s=14, label=named)
                    panel.hlines(mean(losses), x - 0.09, x + 0.09, color=colour)
                    named = "_"  # one entry in the legend, not one for each number of bits
        panel.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS])
        panel.set_title("query and value" if targets == "auto" else "all linears")
        panel.set_xlabel("bits of the base")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats a token")
    panels[-1].legend()
    seeds = len({run["seed"] for run in runs})
    figure.suptitle(
        f"Held-out loss after {steps} steps: points are seeds ({seeds}), bars their mean"
    )
    figure.savefig(path, dpi=150)
    return True


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--steps", type=int, default=300)
    data = Path(os.environ.get("QLORA_KIT_DATA", "")) / "text" / "wikisql"
    parser.add_argument("--data", default=str(data), help="what --data of finetune takes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.side == "peft":
        print(json.dumps(losses_of_peft(given)))
        return
    if given.side == "ours":
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(losses_of_ours(given, Path(directory))))
        return
    path = given.results / f"{given.result}.json"
    measured = {
        "model": "tiny",
        "data": Path(given.data).name,
        "steps": given.steps,
        "settings": settings(given.steps),
    }
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = all(kept.get(name) == value for name, value in measured.items())
    runs: list[dict[str, Any]] = kept["runs"] if same else []
    done = {tuple(run[name] for name in KEY) for run in runs}
    # Seeds outermost: what an interrupted run leaves has every row of the table.
    wanted = [
        dict(zip(KEY, (side, bits, targets, seed), strict=True))
        for seed, bits, targets, side in itertools.product(
            given.seeds, given.bits, given.targets, SIDES
        )
    ]
    commit = provenance()["commit"]
    with ThreadPoolExecutor(given.jobs) as pool:
        started = [
            pool.submit(run_apart, case, given)
            for case in wanted
            if tuple(case.values()) not in done
        ]
        for ended in as_completed(started):
            run = {**ended.result(), "commit": commit}
            print(*(run[name] for name in (*KEY, "loss_before", "loss")), flush=True)
            runs.append(run)
            write_result(given, {**measured, "runs": runs, "table": table(runs)})
    show(table(runs))
    print(path)
    picture = path.with_suffix(".png")
    print(picture if plot(runs, picture, given.steps) else "no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
