"""The messages of a request to the tokens before their answer, as training puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.data.answers import chat_ids
from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.fields import Fields
from qlora_kit.data.rendering import SYSTEM, header_text, is_written
from qlora_kit.data.tokens import Tokens
from qlora_kit.data.turns import check_order, messages_of
from qlora_kit.serving.errors import invalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: ChatOptions
) -> list[int]:
    """The tokens before the answer to some messages.

    Errors: `ApiError` for a tokenizer without a template and for a system message that the template
    would leave out without a word; `QloraKitError` of the messages and the template.
    """
    if not tokenizer.chat_template:
        raise invalid("this model has no chat template; use /v1/completions", "messages")
    turns = messages_of(Fields({"messages": list(messages)}, "request"), "messages")
    check_order(turns, "request: messages")
    if turns[0]["role"] in SYSTEM:
        written = header_text(turns, Tokens(tokenizer), options)
        if not is_written(turns[0], written.text):
            raise invalid(
                "the model's chat template leaves the system message out; say it in the user's",
                "messages",
            )
    return chat_ids(turns, tokenizer, options)
