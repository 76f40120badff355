"""Learning from pairs against TRL's trainer: the same pairs, masters, order and optimizer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.data.batch import eval_pairs, padding_id
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.rows import Row
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.data.schema import normalise
from qlora_kit.export.peft_model import to_peft
from qlora_kit.lora.inject import inject_lora
from qlora_kit.training.loop import train
from qlora_kit.training.optimizer import make_optimizer
from qlora_kit.training.preference import objective_of, reference_log_probabilities
from qlora_kit.training.prepare import prepare_model

STEPS, PAIRS = 30, 4
STORIES = Path(os.environ.get("QLORA_KIT_DATA", "none")) / "models" / "stories260K"
RATE = 2e-3


def pairs_of_rows(count):
    """Sorting three numbers, the wrong way round in the rejected answer, which may be short."""
    draw = random.Random(0)
    for _ in range(count):
        words = [str(draw.randint(10, 99)) for _ in range(3)]
        right, wrong = sorted(words), sorted(words, reverse=True)[: draw.randint(1, 3)]
        yield {
            "prompt": f"sort {' '.join(words)}:",
            "chosen": f" {' '.join(right)}",
            "rejected": f" {' '.join(wrong)} x",
        }


def adapted(model):
    base = load_base(model, bits=16, dtype="fp32")
    return base, inject_lora(base.model, LoRAConfig(r=4, alpha=8.0, dropout=0.0), seed=1)


def their_losses(model, rows, order, training):
    """The losses of each step, and the tokens of the first one."""
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

        def _compute_loss(self, model, inputs, return_outputs):
            tokens.append(inputs["input_ids"])
            return super()._compute_loss(model, inputs, return_outputs)

    base, _ = adapted(model)
    tokens = []
    settled = training.settled()
    args = trl.DPOConfig(
        output_dir="unused",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=PAIRS,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        beta=settled.beta,
        loss_type=[settled.dpo_loss],
    )
    trainer = InOrder(
        model=to_peft(base),
        args=args,
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=base.tokenizer,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, tokens[0]


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ("tiny", TrainingConfig(method="dpo")),
        (str(STORIES), TrainingConfig(method="dpo", beta=0.5, dpo_loss="ipo")),
    ],
    ids=["tiny", "stories260K"],
)
def test_thirty_steps_are_those_of_trl(model, training, tmp_path, monkeypatch):
    """Sums in another order, over thirty steps of AdamW in fp32: within 1e-4."""
    if model != "tiny" and not STORIES.exists():
        pytest.skip("QLORA_KIT_DATA has no stories260K")
    monkeypatch.chdir(tmp_path)
    rows = list(pairs_of_rows(STEPS * PAIRS))
    base, ours = adapted(model)
    assert prepare_model(ours, training, "none") is None
    read = [
        Row(one.content, "pairs", line)
        for line, row in enumerate(rows)
        for one in normalise(row, "preference", "pairs")
    ]
    encoded = encode_rows(read, base.tokenizer, 256).rows
    unknown, pad = torch.zeros(len(encoded)), padding_id(base.tokenizer)
    batches = eval_pairs(encoded, unknown, PAIRS, pad)
    reference = reference_log_probabilities(ours, batches, len(encoded))
    schedule = StepSchedule(
        rows=encoded, batch_size=PAIRS, num_steps=STEPS, seed=5, pad_id=pad, pairs=True,
        reference=reference,
    )  # fmt: skip
    order = [pair for step in range(STEPS) for pair in schedule.rows_of(step + 1)]
    optimizer = make_optimizer("adamw", ours.parameters(), RATE)
    history = train(ours, schedule, optimizer, objective=objective_of(training))
    logs, tokens = their_losses(model, rows, order, training)
    first = next(iter(schedule))[0]
    sides = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]  # theirs has all chosen ones first
    width = tokens.shape[1]
    for place, row in enumerate(sides):
        length = first["lengths"][row]
        assert first["input_ids"][row, :length].tolist() == tokens[place, :length].tolist()
        assert width >= length
    assert history[-1].loss < history[0].loss
    for report, log in zip(history, logs, strict=True):
        assert report.loss == pytest.approx(log["loss"], rel=1e-4, abs=1e-4), report.step
        assert report.measures["margin"] == pytest.approx(log["rewards/margins"], abs=2e-4)
