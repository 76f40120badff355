"""What `gpu.py` needs, made where there is no card: into one folder of less than 60 MB.

    python benchmarks/gpu_prepare.py --output prepared                         # for a card
    python benchmarks/gpu_prepare.py --output prepared --device cpu --small    # to try it

In the folder: `packages/`, what a machine with torch and transformers may lack (bitsandbytes with
the libraries of one CUDA and of the CPU alone, and packages of Python files), each used only where
it is missing; `families/`, tiny checkpoints of every family with the gradients that they have on
the CPU; `plans.json`, the plan of every point that is measured; `prepared.json`, the versions and
the commit that made it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from record import provenance
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from gpu_parts.families import BITS, apart, gradients_of, prepared_model, rows_batch  # noqa: E402
from gpu_parts.setting import lora_options, training_options  # noqa: E402
from gpu_parts.shapes import PLANNED, SHAPES, Point, shape_of, write_shape  # noqa: E402

from qlora_kit.config.base import BaseConfig  # noqa: E402
from qlora_kit.device.cards import CARDS, Card, find_card  # noqa: E402
from qlora_kit.memory.counter import Interval  # noqa: E402
from qlora_kit.plan.memory_plan import BatchShape  # noqa: E402
from qlora_kit.plan.plan import Planner  # noqa: E402
from qlora_kit.plan.step_time import Clock, StepTime  # noqa: E402

MOST_BYTES = 60_000_000
PACKAGES = {
    "bitsandbytes": ("bitsandbytes",),
    "peft": ("peft",),
    "accelerate": ("accelerate",),
    "rich": ("rich", "markdown-it-py", "mdurl", "pygments"),
    "pytest": ("pytest", "pluggy", "iniconfig"),
}
"""The distributions that stand behind a name to import."""
CARD = "h100"
"""Steps are planned for it, unless for another: it has what all cards have since 2020."""
LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_{cuda}.so")


def main() -> None:
    given = parse()
    if given.output.exists():
        shutil.rmtree(given.output)
    given.output.mkdir(parents=True)
    if not given.small:
        for name, distributions in PACKAGES.items():
            for one in distributions:
                copy_distribution(one, given.output / "packages" / name, given.cuda)
        print("packages", flush=True)
    make_families(given.output / "families", small=given.small)
    plans = {point.name: planned(point, given) for point in chosen_points(given)}
    shapes = {name: shape_of(name, given.small) for name in SHAPES}
    content = {"device": given.device, "shapes": shapes, "plans": plans}
    (given.output / "plans.json").write_text(json.dumps(content, indent=1))
    (given.output / "prepared.json").write_text(json.dumps(provenance(), indent=1))
    size = sum(path.stat().st_size for path in given.output.rglob("*") if path.is_file())
    print(f"{given.output}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"error: {size} bytes are more than {MOST_BYTES}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder; replaced")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="planned for")
    parser.add_argument("--small", action="store_true", help="small models, for a CPU; no packages")
    parser.add_argument("--cuda", default="cuda130", help="library of bitsandbytes (%(default)s)")
    parser.add_argument("--points", type=int, help="plan the first few only")
    return parser.parse_args()


def chosen_points(given: argparse.Namespace) -> list[Point]:
    """The points to be planned."""
    return list(PLANNED[: given.points])


def copy_distribution(name: str, into: Path, cuda: str) -> None:
    """Copy an installed distribution's Python files and metadata, and of libraries the named ones.

    Errors: `SystemExit` where a library is not there.
    """
    libraries = [one.format(cuda=cuda) for one in LIBRARIES]
    found = set()
    for entry in importlib.metadata.distribution(name).files or ():
        path, source = Path(entry), Path(str(entry.locate()))
        if ".." in path.parts or path.suffix in (".pyc", ".exe") or not source.is_file():
            continue
        if path.suffix == ".so" and path.name not in libraries:
            continue
        found.add(path.name)
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, into / path)
    missing = [one for one in libraries if one not in found]
    if name == "bitsandbytes" and missing:
        raise SystemExit(
            f"error: the installed bitsandbytes has no {', '.join(missing)}: install the wheel "
            "from PyPI, which holds a library for each CUDA, or name another one with --cuda"
        )


def make_families(folder: Path, *, small: bool) -> None:
    """Tiny checkpoints, and for each number of bits loss and gradients on the CPU in fp32."""
    from families import FAMILIES, save_checkpoint

    for family in FAMILIES[:1] if small else FAMILIES:
        save_checkpoint(folder / family, family)
        for bits in BITS:
            made = {}
            for dtype in ("fp32", "bf16"):
                model, _ = prepared_model(folder / family, bits, dtype, torch.device("cpu"))
                made[dtype] = gradients_of(model, rows_batch())
            (loss, gradients), (_, in_bf16) = made["fp32"], made["bf16"]
            far = torch.tensor(apart(in_bf16, gradients))
            tensors = {"loss": torch.tensor(loss), "in_bf16": far, **gradients}
            save_file(tensors, folder / family / f"reference-{bits}.safetensors")
        print(family, flush=True)


class Clocks(Clock):
    """The clock of a card that notes what the step takes on every card: `found`, by their names."""

    def __init__(self, card: Card) -> None:
        super().__init__(card)
        object.__setattr__(self, "found", {})

    def step(
        self,
        passes: Iterable[Interval],
        update: Iterable[Interval],
        micro_steps: int,
        tokens: int,
    ) -> StepTime:
        """As that of the card, on all."""
        work = list(passes), list(update), micro_steps, tokens
        for card in CARDS.values():
            self.found[card.name] = Clock(card).step(*work).as_json()
        return super().step(*work)


def planned(point: Point, given: argparse.Namespace) -> dict[str, Any]:
    """The plan of a point, as `qlora-kit plan --json` has it, with its time on every card."""
    path = write_shape(point.model, given.small, given.output)
    config = BaseConfig(str(path), bits=4, dtype=point.dtype, device=given.device)
    lengths = point.row_lengths(given.small)
    shape = BatchShape(point.rows, sum(lengths), sum(lengths) - 1, point.packed, max(lengths))
    clock = Clocks(find_card(point.card or CARD)) if given.device == "cuda" else None
    options = lora_options(point.targets), training_options()
    planner = Planner(config, *options, given.device, clock=clock)
    plan = planner.plan(shape, point.level, micro_steps=point.micro_steps)
    path.unlink()
    print(f"{point.name}: {plan.peak_bytes}", flush=True)
    return {**plan.as_json(), "modelled": clock.found if clock else {}}


if __name__ == "__main__":
    main()
