"""The optimization: rates, batches, steps, and what the backward pass recomputes."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

from qlora_kit.errors import ConfigError
from qlora_kit.options.checks import (
    FALSE,
    MOST_ROWS,
    MOST_STEPS,
    SEEDS,
    a_size,
    also,
    between,
    one_of,
    size_bytes,
)
from qlora_kit.options.option import Options, option

OPTIMIZERS = (
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
)
SCHEDULES = ("cosine", "linear", "constant")
RECOMPUTE_LEVELS = ("none", "selective", "full")
AUTO = {"auto": None}
PREFERENCE = {"beta": 0.1, "label_smoothing": 0.0, "dpo_loss": "sigmoid"}
"""The options that go with `--method dpo`, and what they are where they are left alone."""
RATES = {"sft": 2e-4, "dpo": 5e-6}  # learning rates of methods, where they are left alone


@dataclass(frozen=True)
class Placement:
    """What lies in the host's memory, or is done in pieces, so that the device of a run holds less.

    It changes no number of a run. The embedding on the host has its rows fetched for each batch. Of
    activations it is the inputs of layers that recompute. A base on the host is streamed, layer by
    layer. A tiled MLP goes over its tokens piece by piece, forward and backward.
    """

    embedding_on_host: bool = False
    activations_on_host: bool = False
    base_on_host: bool = False
    mlp_tiled: bool = False

    @property
    def words(self) -> str:
        """What is where, as a sentence has it: `embedding in host memory, MLPs in tiles`."""
        parts = (
            (self.embedding_on_host, "embedding"),
            (self.activations_on_host, "inputs of layers"),
            (self.base_on_host, "base"),
        )
        there = [part for is_there, part in parts if is_there]
        first = ", ".join(there[:-1])
        said = [f"{first}{' and ' if first else ''}{there[-1]} in host memory"] if there else []
        return ", ".join([*said, *(["MLPs in tiles"] if self.mlp_tiled else [])])

    @property
    def flags(self) -> str:
        """The options that ask for it."""
        asked = (name for name, field in PLACED.items() if getattr(self, field))
        return " ".join(f"--{name}" for name in asked)


ON_DEVICE = Placement()
"""Everything on the device, and at once."""
PLACED = {
    "tiled_mlp": "mlp_tiled",
    "offload_embedding": "embedding_on_host",
    "offload_activations": "activations_on_host",
    "offload_base": "base_on_host",
}
"""The options of a placement and its fields, what costs least first; the first offloads nothing."""


def _or_auto(help: str) -> typing.Any:
    """A switch that is worked out for the run where it is left alone."""
    return option(None, help, reads=also(AUTO), shown_default="auto")


@dataclass(frozen=True)
class TrainingConfig(Options):
    """The optimization."""

    title: typing.ClassVar[str] = "training"

    method: str = option(
        "sft",
        "sft: learn to write rows; dpo: which of two answers is preferred, from pairs of them",
        check=one_of("sft", "dpo"),
    )
    beta: float | None = option(
        None,
        "of dpo: how much a model stays with what it was before; larger: closer",
        check=between(0, 1e3, open_low=True, tiny=1e-9),
        shown_default=str(PREFERENCE["beta"]),
    )
    label_smoothing: float | None = option(
        None,
        "of dpo: share of pairs that are taken to be the wrong way round",
        check=between(0, 0.5, open_high=True),
        shown_default=str(PREFERENCE["label_smoothing"]),
    )
    dpo_loss: str | None = option(
        None,
        "of dpo: sigmoid, or ipo, whose margins end at 1 / (2 beta) a token",
        aliases=("loss_type",),
        check=one_of("sigmoid", "ipo"),
        shown_default=str(PREFERENCE["dpo_loss"]),
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate",
        check=between(0, 1e3, open_low=True, tiny=1e-12),
        shown_default=f"{RATES['sft']:g}; of dpo {RATES['dpo']:g}",
    )
    lr_scheduler_type: str = option("cosine", "after the warm-up", check=one_of(*SCHEDULES))
    warmup_steps: float = option(
        0.03,
        "steps of linear warm-up; below 1: a share of all steps",
        aliases=("warmup_ratio",),
        check=between(0, MOST_STEPS),
    )
    weight_decay: float = option(0.0, "decoupled weight decay", check=between(0, 1e3))
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm", check=between(0, 1e9, open_low=True, tiny=1e-9)
    )
    optim: str = option(
        "auto",
        "auto: adamw (torch's fused); on CUDA paged_adamw_8bit where its states do not fit",
        check=one_of("auto", *OPTIMIZERS),
    )
    gradient_dtype: str = option(
        "fp32",
        "of adapters' gradients between micro-batches; bf16: half the bytes, sums of fewer bits",
        check=one_of("fp32", "bf16"),
    )
    batch_size: int | None = option(
        None,
        "rows of a micro-batch; auto: on a card whose speed is known as many as are planned to be "
        "fastest, and the fewer micro-batches for the same rows a step; elsewhere 1",
        flag="per_device_train_batch_size",
        aliases=("batch_size",),
        check=between(1, MOST_ROWS),
        reads=also(AUTO),
        shown_default="auto",
    )
    gradient_accumulation_steps: int = option(
        16,
        "micro-batches of a step; its rows where their number in a micro-batch is auto",
        check=between(1, MOST_ROWS),
    )
    num_train_epochs: float = option(1.0, "passes over the data", check=between(0, 1e6))
    max_steps: int | None = option(
        None,
        "stop after this many optimizer steps",
        check=between(0, MOST_STEPS),
        reads=also({"-1": None}),
    )
    gradient_checkpointing: str = option(
        "auto",
        "activations that backward recomputes; auto: as few as fit --memory_budget",
        check=one_of("auto", *RECOMPUTE_LEVELS),
        reads=also(dict.fromkeys(FALSE, "none")),
    )
    memory_budget: str | None = option(
        None,
        "bytes that the run may take of its device, such as 8GiB",
        check=a_size,
        metavar="SIZE",
        shown_default="the device's free memory",
    )
    fused_blocks: bool = option(
        True,
        "norms, rotary embeddings and MLPs that keep less for the backward pass, same numbers",
        aliases=("own_blocks",),
    )
    triton_kernels: bool = option(
        True, "on CUDA norms, rotary embeddings, MLPs and 4-bit weights by Triton, same numbers"
    )
    tiled_mlp: bool | None = _or_auto(
        "MLPs go over their tokens in tiles, same numbers; auto: where the run does not fit else"
    )
    offload_embedding: bool | None = _or_auto(
        "the embedding stays in the host's memory, and rows are fetched for each batch, same "
        "numbers; auto: on a card where the run does not fit else"
    )
    offload_activations: bool | None = _or_auto(
        "inputs of layers that recompute wait in the host's memory, same numbers; auto: on a card "
        "where the run does not fit else"
    )
    offload_base: bool | None = _or_auto(
        "the base stays in the host's memory, and a layer is on the card while it runs, same "
        "numbers; auto: on a card where nothing else fits, or less has to be recomputed with it"
    )
    seed: int = option(42, "of adapters, data order, dropout and sampling", check=SEEDS)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, or its pairs: 1 until `auto` has chosen."""
        return 1 if self.batch_size is None else self.batch_size

    @property
    def pairs(self) -> bool:
        """Whether rows are pairs of answers, each of two rows of a batch."""
        return self.method == "dpo"

    def settled(self) -> TrainingConfig:
        """The same with the values of options that go with its method and were left alone."""
        values = {"learning_rate": self.peak_rate, **(PREFERENCE if self.pairs else {})}
        left = {name: to for name, to in values.items() if getattr(self, name) is None}
        return replace(self, **typing.cast(typing.Any, left))

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, or that of the method where it is left alone."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def step_rows(self) -> int:
        """Rows of a step, in however many micro-batches."""
        return self.rows * self.gradient_accumulation_steps

    def placements_on(self, own_memory: bool) -> tuple[Placement, ...]:
        """What these options allow on a device, what costs least first, each with all before it.

        What is asked for is in all of them. What is left to auto is off in the first; the host's
        memory is no other one where the device has no `own_memory`.
        """
        left = self._left(own_memory)
        asked = {field: getattr(self, name) is True for name, field in PLACED.items()}
        taken = (left[:count] for count in range(len(left) + 1))
        return tuple(Placement(**asked | {PLACED[name]: True for name in some}) for some in taken)

    def placements_from(self, placement: Placement, own_memory: bool) -> tuple[Placement, ...]:
        """Those that a loaded model can go on with: this one, then what else auto may take."""
        found = [placement]
        for name in self._left(own_memory):
            if name in ("tiled_mlp", "offload_activations"):
                found.append(replace(found[-1], **{PLACED[name]: True}))
        return tuple(dict.fromkeys(found))

    def flags_from(self, placement: Placement, own_memory: bool) -> str:
        """The options left to auto that would hold less on the device from the start."""
        left = self._left(own_memory)
        return " ".join(f"--{name}" for name in left if not getattr(placement, PLACED[name]))

    def _left(self, own_memory: bool) -> list[str]:
        """The options of a placement that are left to auto and that it may take."""
        may = dict.fromkeys(PLACED, own_memory)
        may["tiled_mlp"] = self.fused_blocks  # tiles are those of our blocks
        may["offload_activations"] &= self.gradient_checkpointing != "none"
        return [name for name in PLACED if may[name] and getattr(self, name) is None]

    def check_packing(self, packing: bool) -> None:
        """Refuse packs of pairs. Errors: `ConfigError`."""
        if self.pairs and packing:
            raise ConfigError(
                "packing true with method dpo, whose pairs are rows of one batch",
                "leave --packing out; --group_by_length pads less, too",
            )

    def in_micro_batches_of(self, rows: int) -> TrainingConfig:
        """The same steps, in micro-batches of so many rows, a divisor of `step_rows`."""
        count = self.step_rows // rows
        return replace(self, batch_size=rows, gradient_accumulation_steps=count)

    @property
    def budget_bytes(self) -> int | None:
        """`memory_budget` as a number, where it is given."""
        return None if self.memory_budget is None else size_bytes(self.memory_budget)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.method == "sft":
            given = [name for name in PREFERENCE if getattr(self, name) is not None]
            if given:
                values = ", ".join(f"{name} {getattr(self, name)}" for name in given)
                yield f"{values} without --method dpo, whose options they are"
        elif self.dpo_loss == "ipo" and self.label_smoothing:
            yield f"label_smoothing {self.label_smoothing:g} with dpo_loss ipo, which has none"
        if self.num_train_epochs == 0 and not self.max_steps:
            yield (
                f"num_train_epochs 0 with max_steps {self.max_steps or 0} leaves no step to train"
            )
        elif self.max_steps == 0:
            yield "max_steps 0 leaves no step to train: leave it out, or give at least 1"
        if self.offload_activations and self.gradient_checkpointing == "none":
            yield (
                "offload_activations true with gradient_checkpointing none moves nothing: what it "
                "moves are inputs of layers that recompute"
            )
        if self.tiled_mlp and not self.fused_blocks:
            yield "tiled_mlp true with fused_blocks false has no MLP of ours to go over in tiles"
