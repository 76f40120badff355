"""Values of every type at every field of a model's and an adapter's JSON files: a target.

A case changes one field of one file (or two of them), takes it away, adds one that the file may
have, puts a value inside a nested one, or writes what `json.dumps` would not: then a command that
reads the file is run on it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anything import Case, value
from json_mutations import CHANGES, edited

CODE = ("auto_map", "attn_implementation", "_attn_implementation_internal", "custom_generate")
FIELDS: dict[str, tuple[str, ...]] = {
    # The fields that a file of this name may have: what transformers and PEFT read of it.
    "config.json": (
        *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "sliding_window", "layer_types", "max_window_layers"),
        *("use_sliding_window", "hidden_act", "hidden_activation", "rms_norm_eps", "rope_theta"),
        *("rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias", "mlp_bias"),
        *(
            "tie_word_embeddings",
            "use_cache",
            "attention_dropout",
            "resid_pdrop",
            "initializer_range",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "id2label"),
        *("num_labels", "problem_type", "is_encoder_decoder", "pretraining_tp", "return_dict"),
        *("output_attentions", "output_hidden_states", "transformers_version", "name_or_path"),
        *("quantization_config", "query_pre_attn_scalar", "final_logit_softcapping", "text_config"),
        *(
            "attn_logit_softcapping",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        *("attention_multiplier", "num_local_experts", "vision_config", "tokenizer_class"),
        *("per_layer_config", "sub_configs", "to_dict", "chunk_size_feed_forward", "temperature"),
        *CODE,
    ),
    "tokenizer_config.json": (
        *("tokenizer_class", "bos_token", "eos_token", "pad_token", "unk_token", "cls_token"),
        *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "backend"),
        *("model_max_length", "padding_side", "truncation_side", "chat_template", "add_bos_token"),
        *(
            "add_eos_token",
            "add_prefix_space",
            "clean_up_tokenization_spaces",
            "legacy",
            "use_fast",
        ),
        *("split_special_tokens", "model_input_names", "fast_tokenizer_files", "name_or_path"),
        *("tokenizer_file", "vocab_file", "tokenizer_object", "init_inputs", "special_tokens_map"),
        *("model_specific_special_tokens", "processor_class", "sp_model_kwargs", "errors", "vocab"),
        *(
            "fix_mistral_regex",
            "is_local",
            "local_files_only",
            "image_token",
            "merges",
            "from_slow",
        ),
        *CODE,
    ),
    "generation_config.json": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_p", "top_k"),
        *("do_sample", "max_length", "max_new_tokens", "num_beams", "num_return_sequences"),
        *("repetition_penalty", "stop_strings", "cache_implementation", "cache_config", "min_p"),
        *("forced_eos_token_id", "suppress_tokens", "bad_words_ids", "sequence_bias", "use_cache"),
        *("watermarking_config", "compile_config", "guidance_scale", "transformers_version"),
        *("no_repeat_ngram_size", "early_stopping", "prompt_lookup_num_tokens", "max_time"),
        *("decoder_start_token_id", "constraints", "output_scores", "is_assistant", *CODE),
    ),
    "adapter_config.json": (
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r"),
        *("lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"),
        *("alpha_pattern", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "layer_replication"),
        *("trainable_token_indices", "loftq_config", "eva_config", "corda_config", "auto_mapping"),
        *("megatron_config", "megatron_core", "lora_bias", "target_parameters", "runtime_config"),
        *("peft_version", "qalora_group_size", "ensure_weight_tying", *CODE),
    ),
}
INSIDE = {
    # What may stand in a field that holds an object.
    "rope_scaling": ("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    "rope_parameters": ("rope_type", "rope_theta", "factor", "short_factor", "long_factor"),
    "quantization_config": ("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
    "added_tokens_decoder": ("0", "5", "300", "-1", "99999999999"),
    "rank_pattern": ("q_proj", "v_proj", "(a+)+$", ""),
    "alpha_pattern": ("q_proj", "model.layers.0.self_attn.q_proj"),
}
HINTS: tuple[Any, ...] = (
    # Values that mean something somewhere, at a field where they may not.
    *("evil/repo", "yarn", "longrope", "dynamic", "linear", "llama3", "gpt2", "LlamaTokenizer"),
    *("BertTokenizer", "T5Tokenizer", "PreTrainedTokenizerFast", "MistralCommonBackend", "right"),
    *("{{ messages }}", "{% for x in range(10**9) %}a{% endfor %}", "qwen2", "gemma2", "phi3"),
    *([0], [1, 2], {"": "a"}, [["a", 1]], {"content": "<x>", "special": True}, [None], "paged"),
)


@dataclass
class Fields:
    """Every field of config, tokenizer config, generation config and adapter config."""

    name: str = "fields"

    def make(self, draw: random.Random, work: Path) -> Case:
        """As the protocol says."""
        file = draw.choice(list(FIELDS))
        owner = work / ("adapter" if file.startswith("adapter") else "base")
        path = owner / file
        document = json.loads(path.read_text()) if path.exists() else {}
        if draw.random() < 0.15 and document:
            change = draw.choice(CHANGES)
            text = edited(json.dumps(document), lambda one: change(one, draw))
            place, shown = change.__name__, text
        else:
            place, shown = self._set(document, file, draw), ""
            if draw.random() < 0.2:
                place += " and " + self._set(document, file, draw)
            text = json.dumps(document, default=str)
            shown = text
        path.write_text(text)
        return Case(*self._run(file, draw), f"{file} {place}", shown[-80:])

    def _set(self, document: dict[str, Any], file: str, draw: random.Random) -> str:
        """Change one field; returns its name."""
        field = draw.choice([*document, *FIELDS[file]])
        if draw.random() < 0.1:
            document.pop(field, None)
            return f"no {field}"
        drawn = draw.choice(HINTS) if draw.random() < 0.3 else value(draw)
        held = document.get(field)
        if draw.random() < 0.5 and (field in INSIDE or isinstance(held, dict)):
            inner = dict(held) if isinstance(held, dict) else {}
            key = draw.choice([*inner, *INSIDE.get(field, ("a",))])
            inner[key] = drawn
            document[field] = inner
            return f"{field}.{key}"
        document[field] = drawn
        return field

    def _run(self, file: str, draw: random.Random) -> tuple[str, list[str]]:
        generate = ["--prompt", "a day", "--max_new_tokens", "2", "--dtype", "fp32"]
        if file == "adapter_config.json":
            base = ["--model", "./base"] if draw.random() < 0.7 else []
            return "generate", ["--adapter", "adapter", *base, *generate]
        if file == "config.json" and draw.random() < 0.05:
            return "plan", ["--model", "base/config.json", "--max_length", "32"]
        if file != "generation_config.json" and draw.random() < 0.4:
            return "show_data", [
                "--model",
                "./base",
                *["--data", "rows.jsonl", "--token_cache", "none"],
            ]
        return "generate", ["--model", "./base", "--bits", "16", *generate]
