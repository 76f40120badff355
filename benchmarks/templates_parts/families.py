"""The families whose turns a masker can find, and a tokenizer for a family's template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the tokenizers of Llama 3 and Qwen split a text."""

CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?(?:start|end)_of_\w+>|</?think>|</?tool\w*>|</?s>"
    r"|\[/?[A-Z_]{3,20}\]|<[a-z]{2,8}>|<extra_id_\d>|\[\|[a-z]+\|\]"
)
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "</s>"),
    *("<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|return|>", "<turn|>", "<|endoftext|>"),
)
"""Tokens of which the first that a template writes is taken for its EOS, with no better word."""


@dataclass(frozen=True)
class Family:
    """A family whose turns a masker can find: their header, the tokens that end them, EOS, BOS."""

    name: str
    files: str
    header: str
    ends: tuple[str, ...]
    eos: str
    bos: str | None = None


CHATML = (r"<\|im_start\|>assistant\n", ("<|im_end|>",), "<|im_end|>")
LLAMA = (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", ("<|eot_id|>", "<|eom_id|>"))
MISTRAL = (r"\[/INST\]|\[/TOOL_RESULTS\]", ("</s>",), "</s>", "<s>")
DEEPSEEK = (r"<｜Assistant｜>(?:<think>\n)?", ("<｜end▁of▁sentence｜>",), "<｜end▁of▁sentence｜>")
FAMILIES = [
    Family("Llama 3", "trl-llama3.jinja", *LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    Family("Llama 3.1", "Llama-3.1-8B-Instruct", *LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    Family("Llama 3.2", "Llama-3.2-3B", *LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    Family("Llama 3.3", "Llama-3.3-70B", *LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    Family("Qwen 2.5", "Qwen2.5-7B", *CHATML),
    Family("Qwen 3", "Qwen3-0.6B", *CHATML),
    Family("QwQ", "QwQ-32B", r"<\|im_start\|>assistant\n(?:<think>\n)?", *CHATML[1:]),
    Family("Qwen 3 2507", "qwen3_instruct_2507.jinja", *CHATML),
    Family("Hermes 2", "Hermes-2-Pro", *CHATML, "<|begin_of_text|>"),
    Family("Hermes 3", "Hermes-3", *CHATML, "<|begin_of_text|>"),
    Family("SmolLM 3", "SmolLM3", *CHATML),
    Family("Mistral Nemo", "Mistral-Nemo", *MISTRAL),
    Family("Mistral Small", "Mistral-Small-3.2", *MISTRAL),
    Family("Devstral", "Devstral", *MISTRAL),
    Family("Gemma 2", "gemma-2-2b", r"<start_of_turn>model\n", ("<end_of_turn>",), "<eos>", "<bos>"),
    Family("Gemma 3", "trl-gemma3.jinja", r"<start_of_turn>model\n", ("<end_of_turn>",), "<eos>", "<bos>"),
    Family("Phi 3", "trl-phi3.jinja", r"<\|assistant\|>\n", ("<|end|>",), "<|endoftext|>"),
    Family("Phi 3.5", "Phi-3.5-mini", r"<\|assistant\|>\n", ("<|end|>",), "<|endoftext|>"),
    Family("DeepSeek R1", "R1-Distill-Llama", *DEEPSEEK, "<｜begin▁of▁sentence｜>"),
    Family("DeepSeek R1 Qwen", "R1-Distill-Qwen", *DEEPSEEK, "<｜begin▁of▁sentence｜>"),
    Family("Granite 3.3", "granite-3.3", r"<\|start_of_role\|>assistant<\|end_of_role\|>", ("<|end_of_text|>",), "<|end_of_text|>"),
    Family("Granite 4", "granite-4.0", r"<\|start_of_role\|>assistant<\|end_of_role\|>", ("<|end_of_text|>",), "<|end_of_text|>"),
    Family("Command R+", "command-r-plus", r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>", ("<|END_OF_TURN_TOKEN|>",), "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    Family("gpt-oss", "gpt-oss-120b", r"<\|start\|>assistant", ("<|return|>", "<|call|>"), "<|return|>"),
]  # fmt: skip


def tokenizer_of(template: str, family: Family | None, vocabulary: Path, split: str) -> Any:
    """GPT-2's bytes and merges with the control tokens that a template writes."""
    made = Tokenizer(
        models.BPE.from_file(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "GPT-2")
    if split == "GPT-2":
        made.pre_tokenizer = byte_level
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level]
        )
    made.decoder = decoders.ByteLevel()
    found = dict.fromkeys(CONTROL.findall(template))
    plain = {"<think>", "</think>", *(t for t in found if "tool" in t and not t.startswith("<|"))}
    ends = [end for end in ENDS if end in template] or ["<|endoftext|>"]
    eos, bos = (family.eos, family.bos) if family else (ends[0], None)
    special = [*found, eos, *([bos] if bos else []), *(family.ends if family else ())]
    special = [token for token in dict.fromkeys(special) if token not in plain]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t in found if t in plain])
    names = {"bos_token": bos} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, **names)
    tokenizer.chat_template = template
    return tokenizer
