"""The text decoder inside a multimodal checkpoint: its config, and its tensors under its own names.

A multimodal config.json (the wrapper's) holds the decoder's in `text_config`. Its file has the
decoder under a prefix, beside towers (vision, audio), projectors and heads that predict several
tokens. Everybody else sees the text model alone: the config that `AutoModelForCausalLM` builds,
and the tensors by the names that it has. Towers are recognised by name, stay on the disk, and are
never read. What is neither the decoder's nor a tower's is refused.

Source: transformers' `conversion_mapping.py`, for the prefixes that its classes read and write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base.architecture import architecture_of, refuse_code
from qlora_kit.base.safetensors_file import TensorEntry, some
from qlora_kit.errors import ModelError

DECODER = "model.language_model"
"""Where nearly every wrapper class of transformers has its text decoder."""
OTHER_DECODERS = {
    "idefics2": "model.text_model",
    "idefics3": "model.text_model",
    "smolvlm": "model.text_model",
    "blip-2": "language_model.model",
    "llama4": "language_model.model",
    "nemotron_h_omni": "language_model.model",
}
PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "model.")
"""What stands before the decoder's names in a file, in place of `model.`; the plain one last."""
HEADS = ("lm_head.", "language_model.lm_head.")
TOWERS = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_encoder|vision_embedder|vision_embed_tokens|"
    r"vision_projection|vision_adapter|vision_resampler|visual|visual_embeddings_table|"
    r"image_tower|video_tower|embed_vision|image_newline|audio_tower|audio_model|audio_encoder|"
    r"embed_audio|acoustic_tokenizer_encoder|semantic_tokenizer_encoder|multi_modal_projector|"
    r"mm_projector|projector|language_projection|connector|aligner|merger|qformer|query_tokens|"
    r"resampler_model|high_res_vision_\w+|vqmodel|generation_\w+|encoder|mtp)(\.|$)"
)
"""Parts of a multimodal model that are no text decoder, by the names that transformers gives."""
TEXT_TYPES = {
    # Without images these are the plain family: all three positions of a token are the same.
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
FLAT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
"""Wrappers that were published with the decoder's fields beside the towers' configs."""
POSITIONS = ("mrope_section", "mrope_interleaved")
"""Of a rope that turns by three positions of a token; in a text they are one."""
OUTSIDE = (
    "vocab_size",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
)
"""Fields of the decoder that may stand beside `text_config`."""
WRAPPER_FIRST = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Those in which the wrapper's word counts where both say something, as in transformers."""


@dataclass(frozen=True)
class Wrapper:
    """What is around a text decoder: the whole config.json, and the tensors that stay on the disk.

    `text` is the decoder's config, `decoder` the path of its modules in transformers' multimodal
    class, which stands in place of the text model's `model`. `left` are the towers' tensors, by
    their names in the files; None where the config alone is known.
    """

    config: Mapping[str, Any]
    text: Mapping[str, Any]
    decoder: str
    left: Mapping[str, TensorEntry] | None

    @property
    def model_type(self) -> str:
        """transformers' name of the multimodal family."""
        return str(self.config["model_type"])

    @property
    def left_bytes(self) -> int:
        """The bytes that stay on the disk."""
        return sum(entry.end - entry.start for entry in (self.left or {}).values())


@dataclass(frozen=True)
class TextDecoder:
    """A text model: its config, its tensors by its own names, and what is around it, if anything.

    `entries` is None where the config alone is known. `left` are tensors that stay on the disk.
    """

    config: dict[str, Any]
    entries: dict[str, TensorEntry] | None
    wrapper: Wrapper | None
    left: Mapping[str, TensorEntry] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of the towers before anything is trained."""
        if not self.left:
            return ()
        parts = ", ".join(sorted({_part(name) for name in self.left}))
        size = sum(entry.end - entry.start for entry in self.left.values())
        kind = self.config["model_type"] if self.wrapper is None else self.wrapper.model_type
        return (
            f"{kind}: the text decoder alone is loaded; {parts} ({size:,} bytes) stay on the disk",
        )


def text_config(whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The config of the text decoder in a config.json (at `path`); itself where it is one already.

    Fields that stand outside `text_config` are its own where it has none, and a few where it has,
    as in transformers. Errors: `ModelError` for a text part that is none, or that is quantized in
    another way than the rest; `UnsafeInputError` as `refuse_code`.
    """
    if not is_wrapped(whole):
        return dict(whole)
    refuse_code(whole, path)
    inner = whole.get("text_config") or _flat(whole)
    if not isinstance(inner, dict) or not isinstance(inner.get("model_type"), str):
        raise ModelError(
            f"{path}: text_config is {str(inner)[:60]!r}, not the config of a text model with its "
            "model_type",
            "correct the file",
        )
    if "text_config" in inner or not isinstance(whole.get("model_type"), str):
        raise ModelError(
            f"{path}: model_type {str(whole.get('model_type'))[:60]!r} wraps a model that is "
            "itself wrapped, or has no name",
            "correct the file",
        )
    key, both = "quantization_config", (whole, inner)
    if all(one.get(key) for one in both) and whole[key] != inner[key]:
        raise ModelError(
            f"{path}: {key} stands twice, and text_config says something else", "correct the file"
        )
    config = dict(inner)
    for key in OUTSIDE:
        if whole.get(key) is not None and (key in WRAPPER_FIRST or inner.get(key) is None):
            config[key] = whole[key]
    if isinstance(stored := config.get("quantization_config"), dict):
        config["quantization_config"] = {key: _own_names(value) for key, value in stored.items()}
    if config["model_type"] in TEXT_TYPES or whole["model_type"] in FLAT:
        config["model_type"] = TEXT_TYPES.get(kind := config["model_type"], kind)
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(config.get(key), dict):
                config[key] = _one_position(config[key])
    return config


def text_decoder(
    whole: Mapping[str, Any], entries: Mapping[str, TensorEntry] | None, path: Path
) -> TextDecoder:
    """The text model in a config.json (at `path`) and the tensors of its files, if they are there.

    Errors: `ModelError` naming a tensor that is neither the decoder's nor a tower's, or prefixes
    that do not go together; those of `text_config`.
    """
    config, wrapped = text_config(whole, path), is_wrapped(whole)
    if entries is None or not (wrapped or str(config.get("model_type")).endswith("_text")):
        found, left = None if entries is None else dict(entries), None
    else:
        found, left = _split(entries, path)
    stored_as = architecture_of(config.get("model_type")).stored_as
    if found is not None and stored_as != "model.":
        found = _renamed(found, stored_as, path)
    if not wrapped:
        return TextDecoder(config, found, None, left)
    said = [one.get("tie_word_embeddings") for one in (whole, whole.get("text_config") or whole)]
    if found is not None and _is_open(*said):
        # transformers ties by the wrapper's word unless the file has a head of its own.
        config["tie_word_embeddings"] = "lm_head.weight" not in found
    decoder = OTHER_DECODERS.get(str(whole["model_type"]), DECODER)
    return TextDecoder(config, found, Wrapper(dict(whole), config, decoder, left), left)


def is_wrapped(whole: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a multimodal model around a text decoder."""
    flat = str(whole.get("model_type")) in FLAT and bool(whole.get("vision_config"))
    return whole.get("text_config") is not None or flat


def is_tower(name: str) -> bool:
    """Whether a tensor or a module of a multimodal model belongs to no text decoder."""
    return TOWERS.match(name) is not None


def names_tower(asked: str) -> bool:
    """Whether a name or a regex of modules speaks of a tower."""
    words = re.split(r"[^a-z_]+", asked.replace("\\", " ").lower())
    return any(is_tower(word) or word in ("vision", "audio", "image") for word in words)


def _flat(whole: Mapping[str, Any]) -> dict[str, Any] | None:
    """The decoder's fields where they are not in an object of their own."""
    family = FLAT.get(str(whole.get("model_type")))
    fields = {key: value for key, value in whole.items() if not key.endswith("_config")}
    return None if family is None else {**fields, "model_type": family}


def _is_open(wrapper: Any, text: Any) -> bool:
    """Whether the two words on the tied head say nothing, or contradict each other."""
    return (wrapper is None and text is None) or (None not in (wrapper, text) and wrapper != text)


def _split(
    entries: Mapping[str, TensorEntry], path: Path
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """The decoder's tensors by the text model's names, and the towers' by those of the files."""
    left = {name: entry for name, entry in entries.items() if is_tower(name)}
    found: dict[str, TensorEntry] = {}
    used: dict[str, str] = {}
    unexplained = []
    for name, entry in entries.items():
        if name in left:
            continue
        ours = _text_name(name)
        if ours is None:
            unexplained.append(name)
            continue
        prefix, renamed = ours
        used.setdefault(prefix, name)
        found[renamed] = entry
    if unexplained:
        raise ModelError(
            f"{path.parent}: holds {some(unexplained)}, neither of the text decoder "
            f"({', '.join(f'{one}*' for one in PREFIXES[:3])}) nor of a tower that is known",
            "fetch the files again",
        )
    for kind in (PREFIXES, HEADS):
        both = [used[prefix] for prefix in kind if prefix in used]
        if len(both) > 1:
            raise ModelError(
                f"{path.parent}: holds the text decoder under two prefixes ({', '.join(both)})",
                "fetch the files again",
            )
    return found, left


def _renamed(
    entries: Mapping[str, TensorEntry], stored_as: str, path: Path
) -> dict[str, TensorEntry]:
    """The tensors by the names that the model has, of files that call `model.` something else."""
    names = {name: re.sub(rf"^{re.escape(stored_as)}", "model.", name) for name in entries}
    if len(set(names.values())) < len(names):
        raise ModelError(
            f"{path.parent}: holds tensors of one name under {stored_as} and under model.",
            "fetch the files again",
        )
    return {names[name]: entry for name, entry in entries.items()}


def _text_name(name: str) -> tuple[str, str] | None:
    """The prefix of a tensor of the decoder, and the text model's name of it; None for others."""
    for prefix in HEADS:
        if name.startswith(prefix):
            return prefix, f"lm_head.{name[len(prefix) :]}"
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return prefix, f"model.{name[len(prefix) :]}"
    return None


def _own_names(value: Any) -> Any:
    """A list of modules by the text model's names of them, where `value` is one."""
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    renamed = ((name, _text_name(f"{name}.")) for name in value)
    return [name if found is None else found[1].removesuffix(".") for name, found in renamed]


def _part(name: str) -> str:
    """The tower that a tensor belongs to."""
    found = TOWERS.match(name)
    assert found is not None
    return found[2]


def _one_position(rope: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in rope.items() if key not in POSITIONS}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}
