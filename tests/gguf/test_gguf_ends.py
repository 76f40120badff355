"""llama.cpp stops where answers end."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_reader import Reader, write_vocabulary
from tokenizer_kinds import byte_level

from qlora_kit.errors import TokenizerError
from qlora_kit.gguf.ends import BY_NAME, end_keys
from qlora_kit.gguf.vocabulary import vocabulary

HARMONY = {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>"}
"""Together with these `<|end|>` is no end."""
FILLERS = {"<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|repo_name|>", "<fim-repo>", "<REPO>"}
FILLERS |= {"<reponame>"}
"""Of each sort the first that llama.cpp finds is one."""


def test_answers_stop_at_three_ends_and_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level("smollm")
    names = sorted(BY_NAME - HARMONY - FILLERS)
    tokenizer.add_tokens(names)
    eos = tokenizer.eos_token_id
    found = vocabulary(tokenizer, len(tokenizer), [eos, 300, 301, 302])
    assert found.ids["eos_token_id"] == eos
    assert (found.ids["eot_token_id"], found.ids["eom_token_id"]) == (300, 301)
    write_vocabulary(found, tmp_path / "model.gguf")
    reader = Reader(tmp_path / "model.gguf")

    def stops(token: int) -> bool:
        return bool(reader.answer(token)["stop_type"] == "eos")

    assert [stops(token) for token in (eos, 299, 300, 301, 302)] == [True, False, True, True, False]
    assert all(stops(tokenizer.convert_tokens_to_ids(name)) for name in names)
    assert f"does not stop at '{found.tokens[302]}'" in found.notes[0]
    assert "also stops at" in found.notes[1]
    assert all(repr(name) in found.notes[1] for name in names if name != "</s>")


def test_what_llama_cpp_knows_by_name_leaves_the_room_to_others() -> None:
    tokens = ["a", "<|im_end|>", "<|eot_id|>", "b", "c"]
    keys = {"eos_token_id": 0, "eot_token_id": 3, "eom_token_id": 4}
    assert end_keys(0, [0, 1, 2, 3, 4], tokens) == (keys, [])
    keys = {"eos_token_id": 1, "eot_token_id": 3}
    assert end_keys(None, [1, 3], tokens)[0] == keys
    with pytest.raises(TokenizerError, match="has no EOS"):
        end_keys(None, [], tokens)
