"""What llama.cpp does of its own in a model family, which nothing in a GGUF says.

Found by asking llama.cpp about models with each of these in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALED = ("default", "linear", "yarn")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp reads it; the defaults are those of most families.

    `architecture` is its name there. `pairs_rows` says that its rotary embedding turns neighbours
    (rows 2i and 2i + 1 of a head) where transformers turns a row of each half (i and i + d/2).
    `norm_offset` is what is added to the norms' weights in the file, for the model multiplies by
    that sum and llama.cpp by what it reads. `rope` are transformers' names of the rotary embeddings
    that it computes; `turns_part` says that a part of a head may be left unturned. `activation` is
    the MLP's. `biases` are the fields of a config whose biases it reads. `own_head_dim` says that
    heads need not share the width of the model out among them, `untied` that the head may have
    weights of its own. `windows` says that it has sliding windows, and `assumes_windows` that
    it has them where a file says nothing of any; `names_window` that it ignores them and that older
    releases of it refuse a file that names none. `caps` are the soft caps that
    it reads; those that it `always` has must be there. With `wide_scale_at` layers it scales
    queries by the model's width over the heads, not by a head's. `unturned_every` says that each
    n-th layer has no rotary embedding. `scales` are keys of the file and the fields of config.json
    that they hold.
    """

    architecture: str
    pairs_rows: bool = False
    norm_offset: float = 0.0
    rope: tuple[str, ...] = SCALED
    turns_part: bool = False
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    own_head_dim: bool = True
    untied: bool = True
    windows: bool = False
    assumes_windows: bool = False
    names_window: bool = False
    caps: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    wide_scale_at: int | None = None
    unturned_every: int | None = None
    scales: tuple[tuple[str, str], ...] = ()


LLAMA = Gguf(
    "llama", pairs_rows=True, rope=(*SCALED, "llama3"), biases=("attention_bias", "mlp_bias")
)
QWEN2 = Gguf("qwen2", own_head_dim=False)
QWEN3 = Gguf("qwen3")
GEMMA2 = Gguf(
    "gemma2",
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
    untied=False,
    windows=True,
    assumes_windows=True,
    caps=CAPS,
    always=CAPS,
    wide_scale_at=46,
)
GEMMA3 = Gguf(
    "gemma3",
    norm_offset=1.0,
    rope=("default", "linear"),
    activation="gelu_pytorch_tanh",
    windows=True,
    caps=("final_logit_softcapping",),
    wide_scale_at=62,
)
PHI3 = Gguf(
    "phi3",
    rope=("default", "longrope"),
    turns_part=True,
    own_head_dim=False,
    names_window=True,
)
GRANITE = Gguf(
    "granite",
    pairs_rows=True,
    rope=(*SCALED, "llama3"),
    biases=("attention_bias", "mlp_bias"),
    scales=(
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("attention.scale", "attention_multiplier"),
        ("logit_scale", "logits_scaling"),
    ),
)
SMOLLM3 = Gguf("smollm3", pairs_rows=True, unturned_every=4)
