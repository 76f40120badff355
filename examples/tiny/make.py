"""Makes everything that `qlora_kit` ships as data: the base model `tiny` and the sample data sets.

    python examples/tiny/make.py            # about half an hour on two CPU cores
    python examples/tiny/make.py --check    # the same again elsewhere, compared with the record

Corpus (`corpus.py`) -> byte-level BPE tokenizer -> a Llama trained from random weights on packed
documents `<s> text </s>` -> bf16 files that `transformers` loads; next to them the data sets of
`tasks.py`. What was run, where, and what came out is written to `record.json`. Nothing is
downloaded.

Training has three parts. A drill comes first: short windows in which a few tokens repeat, the
quickest way to attention heads that copy ("induction heads", Olsson et al. 2022), without which
an adapter on the attention has nothing to steer. On text alone they had not formed after three
million tokens. Then windows of documents, and at the end windows of the full context.

The result depends on the seed, the number of steps and of threads, and on the machine's kernels.
Short runs on one machine with two threads repeat bit for bit; `--check` allows for 5 %.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import corpus
import tasks
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
RECORD = HERE / "record.json"
CORPUS_BYTES, HELDOUT_BYTES = 12_000_000, 200_000
VOCAB_SIZE = 2048
BOS, EOS, PAD, END = "<s>", "</s>", "<pad>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENS_PER_STEP = 2048
DRILL_WINDOW, WINDOW, CONTEXT = 64, 256, 1024
DRILL_STEPS = 600
LONG_SHARE = 0.1  # of the steps, at the end, in windows of the full context
PEAK_LR, WARMUP_STEPS = 2e-3, 100


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text encodes without an unknown token and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        # One token a digit, so that numbers are copied and compared digit by digit.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD, *ROLES, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[*ROLES, END],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of token ids: `<s> text </s> <s> text </s> ...`."""
    eos = tokenizer.eos_token_id
    return torch.tensor([id_ for ids in tokenizer(texts).input_ids for id_ in (*ids, eos)])


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 2.4 million random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size): a narrow model starts slowly at 0.02
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of windows (B, T + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, row: Tensor) -> float:
    """Mean loss over all of `row`, cut into windows of `WINDOW` tokens."""
    windows = row[: len(row) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    losses = [next_token_loss(model, batch) * len(batch) for batch in windows.split(16)]
    return float(sum(losses)) / len(windows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to a hundredth of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def drill(row: Tensor, generator: torch.Generator) -> Tensor:
    """Windows (B, T + 1) that repeat their first 4 to 23 tokens: half text, half random tokens."""
    count, longest = TOKENS_PER_STEP // DRILL_WINDOW, 24
    places = torch.randint(len(row) - longest, (count, 1), generator=generator)
    places = places + torch.arange(longest)
    # Without grammar there is nothing but copying to lower the loss with.
    places[: count // 2] = torch.randint(len(row), (count // 2, longest), generator=generator)
    periods = torch.randint(4, longest, (count, 1), generator=generator)
    return row[places].gather(1, torch.arange(DRILL_WINDOW + 1) % periods)


def sample(row: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """Windows (B, window + 1) from random places of `row`."""
    count = TOKENS_PER_STEP // window
    starts = torch.randint(len(row) - window, (count, 1), generator=generator)
    return row[starts + torch.arange(window + 1)]


def pretrain(model: LlamaForCausalLM, row: Tensor, steps: int, seed: int) -> list[list[float]]:
    """Train in place on windows of `row`; returns the curve as [step, loss] pairs."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    curve, recent, started = [], [], time.perf_counter()
    for step in range(steps):
        if step < DRILL_STEPS:
            windows = drill(row, generator)
        else:
            window = CONTEXT if step >= steps * (1 - LONG_SHARE) else WINDOW
            windows = sample(row, window, generator)
        loss = next_token_loss(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % max(1, steps // 32) == 0:
            curve.append([step + 1, round(sum(recent) / len(recent), 4)])
            speed = (step + 1) * TOKENS_PER_STEP / (time.perf_counter() - started)
            print(f"step {step + 1}/{steps}  loss {curve[-1][1]}  {speed:.0f} tokens/s", flush=True)
            recent = []
    return curve


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a model folder in bf16 that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        # A chat turn ends with <|end|>, a plain completion with </s>.
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def cpu_name() -> str:
    """The CPU's model as Linux tells it, else what `platform` knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make(output_dir: Path, seed: int, steps: int, threads: int) -> dict:
    """Make the model and the samples under `output_dir`; returns the record of the run."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    started = time.perf_counter()
    texts = list(corpus.documents(seed, CORPUS_BYTES))
    tokenizer = train_tokenizer(texts)
    row = pack(tokenizer, texts)
    heldout = pack(tokenizer, list(corpus.documents(seed + 1, HELDOUT_BYTES)))
    print(f"{len(texts)} documents, {CORPUS_BYTES / len(row):.2f} bytes/token", flush=True)
    model = new_model(tokenizer)
    curve = pretrain(model, row, steps, seed)
    save(model, tokenizer, output_dir / "tiny")
    tasks.write(output_dir / "samples", seed)
    made = [*(output_dir / "tiny").iterdir(), *(output_dir / "samples").rglob("*.jsonl")]
    return {
        "command": " ".join(["python", "examples/tiny/make.py", *sys.argv[1:]]),
        "seed": seed,
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "corpus_tokens": len(row),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started),
        "machine": {"cpu": cpu_name(), "threads": threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        # Of the bf16 weights that are shipped.
        "heldout_loss": round(heldout_loss(model, heldout), 4),
        "train_loss_curve": curve,
        "bytes": {str(p.relative_to(output_dir)): p.stat().st_size for p in sorted(made)},
    }


def check(threads: int) -> bool:
    """Run the record's recipe in a temporary folder; is its loss within 5 % of the record's?"""
    recorded = json.loads(RECORD.read_text())
    with tempfile.TemporaryDirectory() as folder:
        again = make(Path(folder), recorded["seed"], recorded["steps"], threads)
    loss, expected = again["heldout_loss"], recorded["heldout_loss"]
    print(f"held-out loss {loss}, recorded {expected}")
    return abs(loss / expected - 1) <= 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=HERE.parents[1] / "qlora_kit" / "assets")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="re-run the record and compare")
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if check(args.threads) else 1)
    record = make(args.output_dir, args.seed, args.steps, args.threads)
    args.record.write_text(json.dumps(record, indent=2) + "\n")
    print(f"held-out loss {record['heldout_loss']} nats/token in {record['seconds']} s")


if __name__ == "__main__":
    main()
