"""Memory of a training step by component: planned against measured, by bits and recompute level.

One shape with random weights in 16, 8 and 4 bits and at each level of recompute, each measured in a
process of its own: the third step is counted tensor by tensor. Beside it stand PEFT as its guide
puts it together, counted the same way, and full fine-tuning, which is planned: transformers' own
step on fake tensors, everything trained with AdamW. Each is in bf16, or in fp32 on a processor that
does not multiply it. Writes a JSON, a table, a picture of the peaks and one of a step; with
--snapshot on CUDA also the allocator's history with its stacks, some 10 MB a setting, for
pytorch.org/memory_viz.

    python benchmarks/memory.py                     # the shape of SmolLM2 135M, 4 x 512
    python benchmarks/memory.py --shape tiny --batch 8 --length 256
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import step_dtype
from pictures import GIB, Bar, draw_bars, draw_step, table
from random_checkpoint import copy_tokenizer, make_checkpoint
from record import make_parser, write_result
from stepping import TINY, batches, make, wait
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.base.config_only import open_shape
from qlora_kit.base.tagged import tag_weights
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import peak_bytes
from qlora_kit.device.target import dtype_name
from qlora_kit.kernels.workspace import tagged_workspace
from qlora_kit.lora.inject import tag_adapters
from qlora_kit.memory.counter import Interval, StorageCounter, most_of_each
from qlora_kit.memory.profiler import AllocatorCounter, follow
from qlora_kit.plan.fake_model import FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.training.attention import positions_unread
from qlora_kit.training.optimizer import tag_states

BITS, LEVELS = [16, 8, 4], ["none", "selective", "full"]
SHAPES = Path(os.environ.get("QLORA_KIT_DATA", "")) / "configs"


def planned(directory: Path, bits: int, level: str, given: argparse.Namespace) -> dict[str, Any]:
    """A step of ours on fake tensors."""
    dtype = dtype_name(step_dtype(given.device))
    base = BaseConfig(model=str(directory / "config.json"), bits=bits, dtype=dtype)
    device = torch.device(given.device)
    lora = LoRAConfig(r=given.rank, alpha=2 * given.rank, target_modules="q_proj,v_proj")
    training = TrainingConfig(optim="adamw")
    run = FakeRun(FakeModel(open_shape(base, device), lora, training, device))
    micro_batches = run.micro_batches(given.batch, given.length, given.length - 1, 1)
    return described([*run.passes(micro_batches, [level] * len(run.layers)), *run.updates])


def planned_full(directory: Path, level: str, given: argparse.Namespace) -> dict[str, Any]:
    """A step of full fine-tuning on fake tensors: transformers' model and loss, AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    counter = StorageCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), positions_unread():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=step_dtype(given.device))
        model.config.use_cache = False
        model.train()
        if level == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        counter.tag("weights_other", [*model.parameters(), *model.buffers()])
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.ones(given.batch, given.length, dtype=torch.int64)
        for _ in range(2):  # the first has no states yet
            first = len(counter.intervals)
            with counter, follow(model, counter):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer_step(counter, optimizer)
    return described(counter.intervals[first:])


def optimizer_step(counter: StorageCounter, optimizer: torch.optim.Optimizer) -> None:
    """Step, counted as a phase; what it made is its states."""
    counter.at("step")
    counter.filling = "optimizer"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tag_states(optimizer, counter.tag)


def measured(side: str, directory: Path, bits: int, level: str, given: Any) -> dict[str, Any]:
    """What `measure` says of a side, in a process of its own."""
    options = ("batch", "length", "rank", "device")
    command = [sys.executable, __file__, "--side", side, "--directory", str(directory)]
    command += ["--bits", str(bits), "--level", level]
    command += [text for name in options for text in (f"--{name}", str(getattr(given, name)))]
    if given.snapshot:
        command += ["--snapshot", f"{given.snapshot}_{side}_{bits}bit_{level}.pickle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Two steps, and a third that is counted."""
    side = "ours" if given.side == "ours" else "peft_guide"
    peer = make(side, given.directory, given.bits[0], given.level[0], given.rank, given.device)
    data = batches(given.directory, given.batch, given.length, 3)
    for ids in data[:2]:
        peer.step(ids)
    wait(given.device)
    device = torch.device(given.device)
    counter = AllocatorCounter(device) if device.type == "cuda" else StorageCounter()
    tag_held(peer, counter)
    if given.snapshot:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with counted(peer, counter):
        peer.step(data[2])
    wait(given.device)
    if given.snapshot:
        torch.cuda.memory._dump_snapshot(given.snapshot)
    found = described(counter.intervals) | {"process": peak_bytes(torch.device(given.device))}
    if isinstance(counter, AllocatorCounter):
        found["allocator"] = {phase: list(said) for phase, said in counter.said.items()}
    return found


def tag_held(peer: Any, counter: StorageCounter) -> None:
    """Say what a model has before a step, whoever made it."""
    if hasattr(peer.model, "get_base_model"):
        found = list(quantized(peer.model))
        known = {one.untyped_storage()._cdata for one in found}
        named = [*peer.model.named_parameters(), *peer.model.named_buffers()]
        counter.tag("weights_quantized", found)
        others = [one for _, one in named if one.untyped_storage()._cdata not in known]
        counter.tag("weights_other", others)
    else:
        tag_weights(peer.model, counter.tag)
    tag_adapters(peer.model, counter.tag)
    tag_states(peer.optimizer, counter.tag)


def quantized(model: nn.Module) -> Iterator[Tensor]:
    """The weights that bitsandbytes has quantized, and their scales, which no module shows."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        states = [getattr(weight, "quant_state", None), getattr(module, "state", None)]
        states.append(getattr(states[0], "state2", None))
        yield weight
        for state in filter(None, states):
            yield from (one for one in vars(state).values() if isinstance(one, Tensor))


@contextlib.contextmanager
def counted(peer: Any, counter: StorageCounter) -> Iterator[None]:
    """Inside, the counter follows one step of either side, its optimizer included."""
    body = peer.model.get_base_model() if hasattr(peer.model, "get_base_model") else peer.model
    hook = peer.optimizer.register_step_pre_hook(lambda *_: counter.at("step"))
    try:
        with tagged_workspace(counter.tag), counter, follow(body, counter):
            yield
    finally:
        hook.remove()


def described(intervals: list[Interval]) -> dict[str, Any]:
    """For JSON: the most of each component, the peak with its place, and the places in order."""
    places = [one for one in intervals if one.phase]
    top = max(places, key=lambda one: one.peak)
    return {
        "bytes": {name: size for name, size in most_of_each(places).items() if size},
        "peak": top.peak,
        "peak_at": f"{top.phase} {top.module}".strip(),
        "at_peak": top.at_peak,
        "step": [
            {"phase": one.phase, "module": one.module, "at_peak": one.at_peak} for one in places
        ],
    }


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """A line for each setting; reductions are against the same level.

    So they are what bits and adapters give, and not what recomputing gives. Full fine-tuning has
    no `selective`: beside that stands its `full`.
    """
    lines = []
    for name, sides in found.items():
        same = "none" if name.endswith("none") else "full"
        trained = found[f"full fine-tuning, {same}"]["planned"]["peak"]
        lora = found.get(f"16 bits, {name.partition(', ')[2]}", {}).get("measured")
        plan, ours, peft = (sides.get(side) for side in ("planned", "measured", "peft"))
        lines.append(
            [
                name,
                f"{plan['peak'] / GIB:.3f}",
                f"{ours['peak'] / GIB:.3f}" if ours else "",
                f"{plan['peak'] / ours['peak'] - 1:+.2%}" if ours else "",
                f"{1 - ours['peak'] / lora['peak']:.0%}" if ours and lora else "",
                f"{1 - ours['peak'] / trained:.0%}" if ours else "",
                f"{peft['peak'] / GIB:.3f}" if peft else "",
            ]
        )
    return lines


TITLES = ["setting", "planned GiB", "measured GiB", "planned over"]
TITLES += ["below 16-bit LoRA", "below full fine-tuning", "PEFT GiB"]


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """Every setting at its peak, as measured where it was."""
    bars = []
    for name, sides in found.items():
        group, _, level = name.partition(", ")
        if "measured" not in sides:
            bars.append(Bar(group + "\n(planned)", level, sides["planned"]["at_peak"]))
            continue
        bars.append(Bar(group, level, sides["measured"]["at_peak"]))
        if "peft" in sides:
            bars.append(Bar(group, f"PEFT, {level}", sides["peft"]["at_peak"]))
    return bars


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "memory")
    parser.add_argument("--shape", default=str(SHAPES / "smollm2_135m.json"), help="file, or tiny")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, choices=BITS)
    parser.add_argument("--level", nargs="+", default=LEVELS, choices=LEVELS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot", help="on CUDA: write snapshots whose names begin so")
    parser.add_argument("--side", choices=("ours", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.side:
        print(json.dumps(measure(given)))
        return
    shape = TINY / "config.json" if given.shape == "tiny" else Path(given.shape)
    name = "tiny" if given.shape == "tiny" else shape.stem
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "base"
        make_checkpoint(shape, directory)
        copy_tokenizer(TINY, directory)
        for level in ("none", "full"):
            key = f"full fine-tuning, {level}"
            found[key] = {"planned": planned_full(directory, level, given)}
        for bits in given.bits:
            for level in given.level:
                sides = {"planned": planned(directory, bits, level, given)}
                sides["measured"] = measured("ours", directory, bits, level, given)
                if level != "selective":
                    sides["peft"] = measured("peft", directory, bits, level, given)
                found[f"{bits} bits, {level}"] = sides
                print(bits, level, flush=True)
    drawn = list(found)[-1]
    places = found[drawn]["measured"]["step"]
    for setting in found.values():
        for side in setting.values():
            del side["step"]
    result = {"shape": name, "batch": given.batch, "length": given.length, "rank": given.rank}
    path = write_result(given, {**result, "device": given.device, "settings": found})
    print(table(TITLES, rows_of(found)))
    setting = f"{name}, {given.batch} x {given.length} tokens, LoRA r {given.rank} on q and v"
    draw_bars(path.with_suffix(".png"), f"Memory of a training step: {setting}", bars_of(found))
    title = f"Memory over one step: {setting}, {drawn}"
    draw_step(path.with_name(f"{path.stem}_step.png"), title, places)
    print(path)


if __name__ == "__main__":
    main()
