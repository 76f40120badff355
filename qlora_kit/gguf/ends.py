"""The tokens at which llama.cpp stops, and what it cannot be told about them.

A GGUF has room for three: the end of a text, of a turn and of a message (`eos`, `eot`, `eom`); an
answer ends at each of them. Beside these llama.cpp knows tokens by what they are called, in every
model, and stops at them without being asked.

Source: llama.cpp's src/llama-vocab.cpp, `special_eog_ids`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qlora_kit.errors import TokenizerError

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
BY_NAME = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *(DEEPSEEK, "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
"""Texts of tokens at which llama.cpp stops in every model."""


def end_keys(
    eos: int | None, ends: Collection[int], tokens: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """The ids of `eos`, `eot` and `eom` for answers that end at each of `ends`, and what to say.

    `eos` is the tokenizer's. Errors: `TokenizerError` where answers have no end at all: llama.cpp
    would take token 11 for it.
    """
    if eos is None and not ends:
        raise TokenizerError(
            "the tokenizer has no EOS and its chat template ends no turn: llama.cpp would stop at "
            "any token that it takes for the end",
            "name the eos_token in tokenizer_config.json",
        )
    named = {"eos_token_id": min(ends) if eos is None else eos}
    # What it would not know by name has the room first.
    others = sorted(set(ends) - set(named.values()), key=lambda one: (tokens[one] in BY_NAME, one))
    named |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    left = [tokens[one] for one in others[2:] if tokens[one] not in BY_NAME]
    notes = []
    if left:
        notes.append(
            f"llama.cpp does not stop at {', '.join(map(repr, left))}: a GGUF names three ends"
        )
    stops = {*ends, *named.values()}
    more = [text for one, text in enumerate(tokens) if text in BY_NAME and one not in stops]
    if more:
        notes.append(f"llama.cpp also stops at {', '.join(map(repr, more))}, by its name")
    return named, notes
