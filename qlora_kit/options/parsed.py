"""Values by their outside names, and those of other tools, to a command's groups of options.

Flags, config files, a program's keyword arguments and what an adapter's run wrote down all come
through here.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_kit.errors import ConfigError, redacted
from qlora_kit.options.option import Options, flag_of

MOST_PROBLEMS = 20
"""As many are told: a line has room for fewer, and each closest name takes a millisecond."""
FOREIGN = {
    # What to write here for what Hugging Face's Trainer, PEFT, TRL, Axolotl, LLaMA-Factory and
    # Unsloth call it; the first name here that the command has is the one.
    "model": "base_model model_id model_name pretrained_model pretrained_model_name_or_path "
    "base_model_name_or_path checkpoint_dir",
    "revision": "model_revision revision_of_model",
    "bits": "quantization_bit quantization_bits load_in nbits wbits quantize",
    "bits 4": "load_in_4bit use_4bit qlora",
    "bits 8": "load_in_8bit use_8bit",
    "bits 16": "load_in_16bit full_precision",
    "quant_type": "bnb_4bit_quant_type quantization_type",
    "double_quant": "bnb_4bit_use_double_quant use_double_quant double_quantization "
    "use_nested_quant",
    "dtype": "torch_dtype bnb_4bit_compute_dtype compute_dtype precision mixed_precision",
    "dtype bf16": "bf16 bfloat16 pure_bf16 bf16_full_eval",
    "dtype fp16": "fp16 half fp16_full_eval",
    "dtype fp32": "fp32 float32 no_half",
    "device": "device_map gpu gpus gpu_id cuda",
    "device cpu": "use_cpu no_cuda cpu",
    "data": "train_file train_data data_path dataset_path dataset_name datasets train_dataset "
    "data_dir dataset_dir training_data train",
    "eval_data": "validation_file eval_file eval_dataset val_file val_data valid_data test_file "
    "test_datasets validation_data dev_data",
    "eval_fraction": "val_set_size val_size eval_size validation_split "
    "validation_split_percentage test_size val_split eval_split",
    "format": "dataset_format prompt_format data_format",
    "columns": "dataset_text_field text_column prompt_column response_column field_mapping",
    "chat_template": "template prompt_template chat_template_path tokenizer_chat_template",
    "train_on_prompt": "train_on_inputs train_on_input train_on_source",
    "no_train_on_prompt": "mask_prompt completion_only_loss assistant_only_loss mask_inputs "
    "train_on_responses_only train_on_completions_only response_only",
    "max_length": "sequence_len seq_len cutoff_len max_seq_len model_max_length block_size "
    "context_length sequence_length max_sequence_length seq_length max_model_len ctx_size n_ctx",
    "packing": "sample_packing pack neat_packing",
    "lora_r": "rank lora_rank lora_dim lora_attn_dim",
    "lora_alpha": "lora_scale",
    "target_modules": "lora_target_modules lora_target lora_modules lora_layers targets",
    "target_modules all-linear": "lora_target_linear all_linear",
    "adapter": "adapter_name_or_path adapter_dir adapter_path lora_model_dir lora_weights "
    "peft_model peft_model_id peft_model_path lora_path checkpoint lora lora_dir lora_modules "
    "adapters loras",
    "use": "adapter_name active_adapter lora_name",
    "method": "stage rl finetuning_stage",
    "beta": "dpo_beta pref_beta rl_beta",
    "dpo_loss": "pref_loss preference_loss",
    "learning_rate": "lr learn_rate max_lr peak_lr",
    "lr_scheduler_type": "lr_scheduler scheduler schedule lr_schedule scheduler_type",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "weight_decay": "wd decay",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip_val gradient_clipping "
    "max_norm max_gradient_norm clip",
    "optim": "optimizer optimizer_type optim_type",
    "per_device_train_batch_size": "micro_batch_size train_batch_size bs mbs batch "
    "mini_batch_size micro_batch",
    "batch_size": "per_device_eval_batch_size eval_batch_size bs batch",
    "gradient_accumulation_steps": "grad_accum grad_accumulation accumulation accumulation_steps "
    "gradient_accumulation accumulate_grad_batches gas grad_acc",
    "num_train_epochs": "epochs num_epochs n_epochs train_epochs max_epochs epoch",
    "max_steps": "steps num_steps train_steps max_train_steps total_steps iters num_iterations "
    "max_iters",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing "
    "checkpoint_activations recompute gradient_checkpointing_kwargs",
    "memory_budget": "max_memory max_memory_mb gpu_memory gpu_memory_utilization",
    "tiled_mlp": "use_tiled_mlp tile_mlp tiled_mlp_num_shards",
    "offload_embedding": "offload_embeddings offload_input_embeddings embed_offload",
    "offload_activations": "activation_offloading enable_activation_offloading "
    "activations_offloading offload_gradient_checkpointing",
    "offload_base": "offload_param offload_params param_offload cpu_offload layer_offloading "
    "offload_model cpu_offload_params",
    "device_memory": "gpu_memory vram max_memory",
    "seed": "random_state random_seed data_seed",
    "output_dir": "output out out_dir save_dir output_path save_path output_directory o "
    "adapter_output_dir export_dir",
    "overwrite": "overwrite_output force clobber",
    "save_steps": "save_strategy save_interval save_every checkpointing_steps saves_per_epoch "
    "save_freq",
    "save_total_limit": "max_checkpoints keep_checkpoints keep_last_n",
    "eval_steps": "eval_strategy evaluation_strategy eval_interval eval_every evals_per_epoch "
    "val_steps do_eval evaluate_during_training",
    "logging_steps": "log_interval log_steps log_every logging_strategy",
    "load_best": "load_best_model_at_end load_best_model",
    "early_stopping": "early_stopping_patience patience",
    "resume_from_checkpoint": "resume auto_resume_from_checkpoints resume_from resume_path "
    "continue",
    "report_to": "tracker trackers log_with logger loggers logging_dir",
    "report_to wandb": "wandb use_wandb wandb_project wandb_run_name",
    "report_to tensorboard": "tensorboard use_tensorboard",
    "report_to none": "no_wandb disable_wandb",
    "max_new_tokens": "max_tokens max_gen_len max_generated_tokens num_tokens n_predict max_length",
    "temperature": "temp",
    "top_p": "nucleus",
    "temperature 0": "greedy do_sample",
    "max_batch": "max_num_seqs max_batch_size parallel n_parallel batch_size",
    "max_queue": "queue_size max_waiting max_queue_size",
    "host": "bind listen address server_name",
    "port": "server_port",
    "api_key": "key auth_key server_key",
    "prompt": "text question query instruction input",
    "shard_size": "max_shard_size export_size",
    "push_to_hub": "hub_repo hf_repo upload_to_hub hub_repo_id repo_id hf_hub_repo upload",
    "dry_run": "dryrun plan_only",
    "group_by_length": "length_grouping",
    # Nothing here is like these: the name that looks closest would mislead.
    "": "neftune_noise_alpha attn_implementation use_flash_attention_2 flash_attention flash_attn "
    "fsdp fsdp_config deepspeed ddp_find_unused_parameters local_rank use_dora use_unsloth "
    "trust_remote_code remove_unused_columns dataloader_num_workers tf32 torch_compile "
    "hub_token label_smoothing_factor adam_beta1 adam_beta2 adam_epsilon "
    "modules_to_save layers_to_transform init_lora_weights bias lora_bias task_type strict "
    "special_tokens dataset_prepared_path xformers_attention liger_kernel use_liger_kernel "
    "unfreeze save_safetensors",
}


def fields_of(
    groups: Sequence[type[Options]],
) -> dict[str, tuple[type[Options], dataclasses.Field[Any]]]:
    """Every option by its outside name; where two groups share a name, the first one has it."""
    found: dict[str, tuple[type[Options], dataclasses.Field[Any]]] = {}
    for group in groups:
        for field in dataclasses.fields(typing.cast(Any, group)):
            found.setdefault(flag_of(field), (group, field))
    return found


def spellings_of(
    fields: Mapping[str, tuple[type[Options], dataclasses.Field[Any]]],
) -> dict[str, str]:
    """Every accepted spelling of a flag or key, with the option's name."""
    spelling = {"config": "config", "debug": "debug"}
    for name, (_, field) in fields.items():
        for other in (name, field.name, *field.metadata["option"]["aliases"]):
            spelling.setdefault(other, name)
    return spelling


def closest(name: str, known: Iterable[str]) -> str:
    """`, did you mean ...?` with the closest known name, or nothing."""
    plain, names = name.lstrip("-").replace("-", "_").lower(), set(known)
    meant = [ours for ours, theirs in FOREIGN.items() if plain in theirs.split()]
    near = [ours for ours in meant if ours.split()[:1] and _option_of(ours) in names]
    if not meant:
        near = difflib.get_close_matches(plain, sorted(names), n=1, cutoff=0.6)
    if not near:
        return ""
    if name.startswith("-"):
        return f", did you mean --{near[0]}?"
    # In a file a colon comes before a value, and a switch has one.
    option = _option_of(near[0])
    said = "false" if near[0].startswith("no_") else near[0].partition(" ")[2]
    return f", did you mean {option}{f': {said}' if said else ''}?"


def version_line() -> str:
    """What `--version` prints."""
    return f"qlora-kit {sys.modules['qlora_kit'].__version__}"


def _option_of(written: str) -> str:
    return written.split()[0].removeprefix("no_")


Group = TypeVar("Group", bound=Options)


@dataclass(frozen=True)
class Parsed:
    """The option groups of a command, and each one's fields that were given, not left alone."""

    groups: Mapping[type[Options], Options]
    given: Mapping[type[Options], frozenset[str]]
    config_file: str | None
    debug: bool

    def __getitem__(self, group: type[Group]) -> Group:
        return typing.cast(Group, self.groups[group])


def parse_values(values: Mapping[str, Any], groups: Sequence[type[Options]]) -> Parsed:
    """The groups of a program's keyword arguments; None leaves an option alone, as in a file.

    Errors: `ConfigError` with everything that is wrong, an unknown name among it.
    """
    spelling = spellings_of(fields_of(groups))
    named: dict[str, Any] = {}
    problems = []
    for word, value in values.items():
        name = spelling.get(word)
        if name is None or name in ("config", "debug"):
            problems.append(f"unknown option {word}{closest(word[:60], spelling)}")
        elif name in named:
            problems.append(f"{name} is given twice, as {word} too")
        elif value is not None:
            named[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    if problems:
        raise ConfigError("; ".join(problems), "correct or remove these names")
    made, given = make_groups(named, groups)
    return Parsed(made, given, None, debug=False)


def make_groups(
    values: Mapping[str, Any], groups: Sequence[type[Options]]
) -> tuple[dict[type[Options], Options], dict[type[Options], frozenset[str]]]:
    """The groups of values by their outside names, and the fields of each that have one.

    Errors: `ConfigError` with everything that is wrong in any of them.
    """
    made, given, problems = {}, {}, []
    fields = fields_of(groups)
    for group in groups:
        own = {
            field.name: values[name]
            for name, (owner, field) in fields.items()
            if owner is group and name in values
        }
        given[group] = frozenset(own)
        try:
            made[group] = group(**own)
        except ConfigError as error:
            problems.append(error.problem)
    if problems:
        raise ConfigError("; ".join(problems), "correct the values named above")
    return made, given


def refuse_tokens(parsed: Parsed) -> None:
    """Refuse a value that holds a token, for commands that write their options down.

    Errors: `ConfigError` naming the flag.
    """
    named = [
        flag_of(field)
        for group, options in parsed.groups.items()
        for field in dataclasses.fields(typing.cast(Any, options))
        if field.name in parsed.given[group]
        and redacted(str(getattr(options, field.name))) != str(getattr(options, field.name))
    ]
    if named:
        raise ConfigError(
            ", ".join(f"--{name} holds a token" for name in named),
            "name it otherwise: a token comes from the environment or the stored login alone",
        )
