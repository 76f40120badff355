"""Which model fits which card, planned as `qlora-kit plan` plans.

For each model the longest rows that fit with everything recomputed, one row at a time: the step on
fake tensors for CUDA, with the overhead that the plan counts. Writes results/cards.json and the
tables between the marks in README.md, here and at the top.

    python benchmarks/cards.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from record import make_parser, write_result

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.options.checks import size_bytes
from qlora_kit.plan.plan import BatchShape, Planner

MODELS = {
    "llama3.2-1b": "llama3_2_1b",
    "gemma2-2b": "gemma2_2b",
    "phi3.5-mini": "phi-3_5",
    "llama2-7b": "llama2_7b",
    "mistral-7b": "mistral_7b",
    "qwen2.5-7b": "qwen2_7b",
    "llama3.1-8b": "llama3_1_8b",
    "qwen3-8b": "qwen3_8b",
    "llama2-13b": "llama2_13b",
}
"""Short names, and the config.json files of the test material that have their shapes."""
CARDS = ("8GB", "12GB", "16GB", "24GB")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TARGETS = {"auto": "query and value", "all-linear": "all linears"}
HERE = Path(__file__).resolve().parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
MARKS = re.compile(r"(<!-- cards -->\n).*?(<!-- /cards -->)", re.S)


def peaks_of(config: Path, targets: str) -> dict[int, int]:
    """The planned peak of one row of each length, as far as the model's context goes."""
    training = TrainingConfig(optim="paged_adamw_8bit", gradient_checkpointing="full")
    lora = LoRAConfig(target_modules=targets)
    planner = Planner(BaseConfig(str(config), bits=4), lora, training, "cuda")
    lengths = (length for length in LENGTHS if length <= planner.run.context)
    return {
        length: planner.plan(BatchShape(1, length, length), "full").peak_bytes for length in lengths
    }


def longest(peaks: dict[int, int], card: str) -> int | None:
    """The longest rows that fit on a card."""
    fitting = [length for length, peak in peaks.items() if peak <= size_bytes(card)]
    return max(fitting, default=None)


def table(found: dict[str, Any]) -> str:
    """Tokens of the longest row that fits, by model, targets and card."""
    lines = [f"| model | adapters on | {' | '.join(CARDS)} |", "|---|---|" + "---:|" * len(CARDS)]
    for model, by_targets in found.items():
        for targets, peaks in by_targets.items():
            cells = (longest(peaks, card) for card in CARDS)
            shown = (f"{cell:,}" if cell else "-" for cell in cells)
            lines.append(f"| {model} | {TARGETS[targets]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    given = make_parser(__doc__, "cards").parse_args()
    configs = Path(os.environ["QLORA_KIT_DATA"]) / "configs"
    found: dict[str, Any] = {}
    for model, name in MODELS.items():
        found[model] = {targets: peaks_of(configs / f"{name}.json", targets) for targets in TARGETS}
        print(model, found[model], flush=True)
    print(write_result(given, {"lengths": LENGTHS, "cards": CARDS, "peak_bytes": found}))
    for page in PAGES:
        text = page.read_text()
        page.write_text(MARKS.sub(lambda marks: f"{marks[1]}{table(found)}\n{marks[2]}", text))


if __name__ == "__main__":
    main()
