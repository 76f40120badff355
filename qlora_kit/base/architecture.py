"""What is special about each supported model family, and why another one is refused.

`ARCHITECTURES` is the one table of such facts: whoever needs one reads it from there. A family is a
`model_type` of transformers whose decoder consists of ordinary linear layers. What is refused is
refused by name, with the bytes that would stay in 16 bits where that is the reason: a base that is
called quantized and mostly is not would be a lie about memory.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.fields import (
    PER_LAYER,
    asks_for_code,
    count_of,
    expert_bytes,
    has_experts,
    problems,
)
from qlora_kit.base.fp8_scheme import check_stored
from qlora_kit.base.gguf_facts import (
    GEMMA2,
    GEMMA3,
    GRANITE,
    LLAMA,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    Gguf,
)
from qlora_kit.errors import ModelError, UnsafeInputError
from qlora_kit.options.checks import size_text


@dataclass(frozen=True)
class Architecture:
    """The facts about one model_type; the defaults are Llama's.

    `attention` is transformers' name of how it is computed. `query_key_value` and `gate_up` name
    the projections of attention and of the MLP, one name each where they are fused. `targets` get
    adapters where none are named. `layers` is where the text decoder's layers lie in a checkpoint.
    `logit_divisor`, `logit_factor` and `logit_softcap` name the fields of config.json that the
    family's own forward applies to the logits; in another family's they mean nothing.
    `unadapted` linears get an adapter only where they are named: those that PEFT refuses, or that
    servers drop; `unquantized` ones are small, or the model reads their weight itself, and stay as
    they are too. `stored_as` is what files have in place of `model.`. `mlp` is
    what a layer calls its MLP, `down` the projection out of it. `rotates_in_windows_alone` says
    that layers without a sliding window have no rotary embedding where others have a window.
    `strict` says that of config.json the fields of `base/fields.py` alone reach the model, else all
    that the family's class declares, and `undeclared`; `rope_needs` names what its rope fields must
    have. `packs` says that its attention keeps the rows of a pack apart by their positions. `known`
    says that what its model is made of is here; else it is found out from the model that is built.
    `gguf` is what llama.cpp does in the family, None where no GGUF is written of it.
    """

    known: bool = True

    attention: str = "sdpa"
    query_key_value: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layers: str = "model.layers"
    logit_divisor: str | None = None
    logit_factor: str | None = None
    logit_softcap: str | None = None
    unadapted: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    stored_as: str = "model."
    mlp: str = "mlp"
    down: str = "down_proj"
    rotates_in_windows_alone: bool = False
    strict: bool = False
    rope_needs: tuple[str, ...] = ()
    packs: bool = True
    undeclared: tuple[str, ...] = ()
    gguf: Gguf | None = None

    def logit_scale_and_softcap(self, config: Any) -> tuple[float, float | None]:
        """The factor on a head's logits and their soft cap, of a model of this `config`."""
        scale = 1.0
        if self.logit_divisor and getattr(config, self.logit_divisor) is not None:
            scale /= getattr(config, self.logit_divisor)
        if self.logit_factor and getattr(config, self.logit_factor) is not None:
            scale *= getattr(config, self.logit_factor)
        return scale, getattr(config, self.logit_softcap) if self.logit_softcap else None


ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral"), Architecture(strict=True, gguf=LLAMA)),
    "qwen2": Architecture(strict=True, gguf=QWEN2),
    "qwen3": Architecture(strict=True, gguf=QWEN3),
    # torch's fused attention has no soft cap of the scores.
    "gemma2": Architecture(
        attention="eager",
        logit_softcap="final_logit_softcapping",
        strict=True,
        gguf=GEMMA2,
    ),
    "gemma3_text": Architecture(logit_softcap="final_logit_softcapping", gguf=GEMMA3),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        Architecture(
            logit_softcap="final_logit_softcapping",
            undeclared=("global_head_dim", "num_global_key_value_heads", "per_layer_config"),
        ),
    ),
    "phi3": Architecture(
        query_key_value=("qkv_proj",),
        gate_up=("gate_up_proj",),
        targets=("qkv_proj",),
        strict=True,
        gguf=PHI3,
    ),
    "granite": Architecture(logit_divisor="logits_scaling", strict=True, gguf=GRANITE),
    # Experts are refused; what they share is then the MLP. Its attention gets no positions
    # (transformers 5.23).
    "granitemoehybrid": Architecture(
        gate_up=("input_linear",),
        logit_divisor="logits_scaling",
        mlp="shared_mlp",
        down="output_linear",
        packs=False,
        targets=("q_proj", "v_proj", "in_proj"),
    ),
    "smollm3": Architecture(gguf=SMOLLM3),
    "olmo2": Architecture(),
    "olmo3": Architecture(),
    "ministral3": Architecture(
        rope_needs=("llama_4_scaling_beta", "original_max_position_embeddings")
    ),
    "glm": Architecture(gate_up=("gate_up_proj",)),
    "glm4": Architecture(gate_up=("gate_up_proj",)),
    "exaone4": Architecture(rotates_in_windows_alone=True),
    **dict.fromkeys(
        ("gemma", "ministral", "cwm", "seed_oss", "ernie4_5", "helium"), Architecture()
    ),
    # Servers drop the two small projections of the gated delta rule, or break on them.
    "qwen3_5_text": Architecture(
        targets=("q_proj", "v_proj", "in_proj_qkv"), unquantized=("in_proj_a", "in_proj_b")
    ),
    "qwen3_next": Architecture(
        targets=("q_proj", "v_proj", "in_proj_qkvz"), unquantized=("in_proj_ba",)
    ),
    "lfm2": Architecture(targets=("q_proj", "v_proj", "in_proj")),
    "bamba": Architecture(targets=("q_proj", "v_proj", "in_proj")),
    # PEFT refuses adapters on the output of a mixer there.
    "nemotron_h": Architecture(
        targets=("q_proj", "v_proj", "in_proj"), unadapted=("out_proj",), stored_as="backbone."
    ),
    "falcon_h1": Architecture(
        targets=("q_proj", "v_proj", "in_proj"),
        unadapted=("out_proj",),
        logit_factor="lm_head_multiplier",
    ),
    "mamba2": Architecture(known=False, unadapted=("out_proj",)),
    "mamba": Architecture(known=False, unadapted=("out_proj",), unquantized=("dt_proj",)),
    "falcon_mamba": Architecture(known=False, unadapted=("out_proj",), unquantized=("dt_proj",)),
    "jamba": Architecture(known=False, unquantized=("dt_proj",)),
    # Found out but for what comes behind the head.
    "cohere": Architecture(known=False, logit_factor="logit_scale"),
    "cohere2": Architecture(known=False, logit_factor="logit_scale"),
    "cohere_compass_text": Architecture(known=False, logit_factor="logit_scale"),
    "granite_swa": Architecture(known=False, logit_divisor="logits_scaling"),
    "hyperclovax": Architecture(known=False, logit_factor="logits_scaling"),
    "minicpm3": Architecture(known=False, logit_divisor="logits_scaling"),
    "nanochat": Architecture(known=False, logit_softcap="final_logit_softcapping"),
    "recurrent_gemma": Architecture(known=False, logit_softcap="logits_soft_cap"),
    "vaultgemma": Architecture(known=False, logit_softcap="final_logit_softcapping"),
    "gemma3n_text": Architecture(known=False, logit_softcap="final_logit_softcapping"),
    "xlstm": Architecture(known=False, logit_softcap="output_logit_soft_cap"),
}
CAUSAL_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
GENERIC = Architecture(known=False)
CONV1D = ("gpt2", "openai-gpt")
TOWERS = (
    "vision_config",
    "vision_tower",
    "audio_config",
    "audio_encoder_config",
    "vision_model",
    "mm_vision_tower",
)


def architecture_of(model_type: Any) -> Architecture:
    """The record of a family, or the generic one (`known` is False) where it has none."""
    return ARCHITECTURES.get(str(model_type), GENERIC)


@functools.cache
def causal_families() -> frozenset[str]:
    """Every model_type that transformers has a causal language model for.

    Read off the source of its table, for importing it imports torch, which takes seconds.
    """
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    table = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == CAUSAL_TABLE:
            pairs = ast.literal_eval(node.value.args[0])  # type: ignore[attr-defined]
            return frozenset(model_type for model_type, _ in pairs)
    raise AssertionError(f"{table} has no {CAUSAL_TABLE}")


def is_causal(model_type: Any) -> bool:
    """Whether transformers has a causal language model of that type; records are asked first."""
    known = isinstance(model_type, str)
    return known and (model_type in ARCHITECTURES or model_type in causal_families())


def check_family(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a `config` (from `path`) of a model that cannot be quantized and trained whole.

    Errors: `ModelError`, `UnsafeInputError`.
    """
    kind = config.get("model_type")
    refuse_code(config, path)
    towers = [key for key in TOWERS if config.get(key)]
    if towers:
        raise ModelError(
            f"{path}: model_type {kind!r} has a tower for other input than text ({towers[0]}), "
            "whose layers would be quantized and adapted as if they were the language model's",
            "give the language model alone, as a checkpoint of its own",
        )
    if has_experts(config):
        raise ModelError(
            f"{path}: model_type {kind!r} is a mixture of experts: its experts are fused tensors, "
            f"not linear layers, so that {_size(expert_bytes(config))} would stay unquantized",
            "use a dense model",
        )
    if kind in CONV1D:
        raise ModelError(
            f"{path}: model_type {kind!r} keeps its layers as Conv1D, not as linear layers, so "
            f"that {_size(_conv1d_bytes(config))} would stay unquantized",
            "use a model of another family, such as llama, qwen3 or gemma3_text",
        )
    if not is_causal(kind):
        raise ModelError(
            f"{path}: transformers has no causal language model of model_type {kind!r}",
            "give a model of a family that transformers builds as one",
        )
    record = architecture_of(kind)
    if config.get("per_layer_config") and "per_layer_config" not in record.undeclared:
        raise ModelError(
            f"{path}: per_layer_config changes single layers, which model_type {kind!r} does not "
            "do here",
            "use a model whose layers are all as config.json says",
        )
    check_stored(config, path)
    wrong = list(problems(config, record.strict))
    if wrong:
        raise ModelError(f"{path}: {'; '.join(wrong)}", "correct the file")


def refuse_code(said: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of settings that has something fetched or run. Errors: `UnsafeInputError`."""
    layers = said.get("per_layer_config")
    if layers and not PER_LAYER.accepts(layers):
        raise UnsafeInputError(
            f"{path}: per_layer_config is {str(layers)[:60]!r}: of single layers head_dim and "
            "num_key_value_heads alone may differ here",
            "use a model whose layers are otherwise all as config.json says",
        )
    if asked := asks_for_code(said):
        raise UnsafeInputError(
            f"{path}: {asked[0]} is {str(asked[1])[:60]!r}, which transformers would fetch or run",
            "remove it from the file: nothing that a model names is fetched or run",
        )


def _conv1d_bytes(config: Mapping[str, Any]) -> int:
    """Bytes in 16 bits of GPT-2's layers: queries, keys, values, output, and a two-matrix MLP."""
    width = count_of(config, "n_embd")
    inner = count_of(config, "n_inner") or 4 * width
    return 2 * count_of(config, "n_layer") * (4 * width * width + 2 * width * inner)


def _size(count: int) -> str:
    return f"{count} bytes ({size_text(count)})" if count else "most of it"
