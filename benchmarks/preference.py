"""Learning from pairs, this package and TRL: the most bytes of a step's tensors, and the losses.

Both train the same adapter from the same masters on the same pairs of random tokens, each in a
process of its own: TRL's `DPOTrainer` on the base that `to_peft` hands over, with its own loss of
chunks of logits, and this package's steps. A counter adds up live tensors over three steps, the
base included. The reference of ours is computed before, under the same counter.

    python benchmarks/preference.py --tokenizer DIRECTORY    # of any small Llama tokenizer
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from random_checkpoint import make_base_files
from record import make_parser, write_result

VOCABULARY, STEPS, RATE = 32000, 3, 1e-3
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
LEVELS = {"none": False, "full": True}
"""Ours, and what `gradient_checkpointing` is TRL's of."""


def main() -> None:
    parser = make_parser(__doc__, "preference")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--side", choices=SIDES, help="measure one side alone (used by itself)")
    parser.add_argument("--level", choices=LEVELS)
    parser.add_argument("--base")
    given = parser.parse_args()
    if given.side:
        found = SIDES[given.side](given)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**found, "process_bytes": most}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        base = make_base_files(SHAPE, Path(place) / "base", given.tokenizer)
        for level in LEVELS:
            row = {side: _apart(given, side, level, base) for side in SIDES}
            ratio = row["ours"]["peak_bytes"] / row["trl"]["peak_bytes"]
            rows.append({"gradient_checkpointing": level, **row, "ratio": ratio})
            print(level, f"{ratio:.3f}", row)
    names = ("pairs", "length", "bits", "dtype")
    settings = {name: getattr(given, name) for name in names}
    write_result(given, {"settings": settings, "shape": SHAPE, "levels": rows})


def _apart(given: Namespace, side: str, level: str, base: Path) -> Any:
    """What a process of its own measures of one side."""
    asked = {"side": side, "level": level, "base": base}
    asked |= {name: getattr(given, name) for name in ("pairs", "length", "bits", "dtype")}
    options = [f"--{name}={value}" for name, value in asked.items()]
    command = [sys.executable, __file__, f"--tokenizer={given.tokenizer}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _rows(given: Namespace) -> list[dict[str, list[int]]]:
    """Pairs of random ids: a half is the prompt, the rejected answer a little shorter."""
    draw, half = random.Random(0), given.length // 2

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 250) for _ in range(count)]

    return [
        {"prompt_ids": ids(half), "chosen_ids": ids(half), "rejected_ids": ids(half - 16)}
        for _ in range(STEPS * given.pairs)
    ]


def _adapted(given: Namespace) -> Any:
    from qlora_kit.base.load import load_base
    from qlora_kit.config.lora import LoRAConfig
    from qlora_kit.lora.inject import inject_lora

    base = load_base(given.base, bits=given.bits, dtype=given.dtype)
    inject_lora(base.model, LoRAConfig(dropout=0.0, target_modules="all-linear"), seed=1)
    return base


def _ours(given: Namespace) -> dict[str, Any]:
    import torch

    from qlora_kit.config.training import TrainingConfig
    from qlora_kit.data.batch import collate_pairs, eval_pairs
    from qlora_kit.data.tokens import Encoded
    from qlora_kit.memory.counter import StorageCounter
    from qlora_kit.training.loop import train
    from qlora_kit.training.optimizer import make_optimizer
    from qlora_kit.training.preference import objective_of, reference_log_probabilities
    from qlora_kit.training.prepare import prepare_model

    model = _adapted(given).model
    training = TrainingConfig(method="dpo")
    prepare_model(model, training, given.level)
    rows = [
        Encoded(row["prompt_ids"] + row[side], [-100] * len(row["prompt_ids"]) + row[side])
        for row in _rows(given)
        for side in ("chosen_ids", "rejected_ids")
    ]
    optimizer = make_optimizer("adamw", model.parameters(), RATE)
    with StorageCounter(model) as counter:
        batches = eval_pairs(rows, torch.zeros(len(rows)), given.pairs, 0)
        reference = reference_log_probabilities(model, batches, len(rows))
        count = 2 * given.pairs
        steps = [
            [collate_pairs(rows[at : at + count], reference[at : at + count], 0)]
            for at in range(0, len(rows), count)
        ]
        history = train(model, steps, optimizer, objective=objective_of(training))
    return {"peak_bytes": counter.peak, "losses": [report.loss for report in history]}


def _trl(given: Namespace) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    from qlora_kit.export.peft_model import to_peft
    from qlora_kit.memory.counter import StorageCounter

    class InOrder(trl.DPOTrainer):  # type: ignore[name-defined, misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # of ids already

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    base = _adapted(given)
    model = to_peft(base)
    with tempfile.TemporaryDirectory() as place:
        args = trl.DPOConfig(
            output_dir=place,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=given.pairs,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            logging_steps=1,
            gradient_checkpointing=LEVELS[given.level],
            max_length=None,
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(_rows(given)),
            processing_class=base.tokenizer,
        )
        with StorageCounter(model) as counter:
            trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"peak_bytes": counter.peak, "losses": losses}


SIDES = {"ours": _ours, "trl": _trl}

if __name__ == "__main__":
    main()
