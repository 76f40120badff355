"""The messages of a request to the tokens before their answer, as training puts them there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.data.answers import chat_ids, unwritten
from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.fields import Fields
from qlora_kit.data.turns import check_order, messages_of
from qlora_kit.serving.errors import invalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions,
    limit: int | None = None,
) -> list[int]:
    """The tokens before the answer to some messages; of more than `limit` perhaps not all.

    Errors: `ApiError` for a tokenizer without a template and for what the template would leave out
    of the messages without a word; `QloraKitError` of the messages and the template.
    """
    if not tokenizer.chat_template:
        raise invalid("this model has no chat template; use /v1/completions", "messages")
    turns = messages_of(Fields({"messages": list(messages)}, "request"), "messages")
    check_order(turns, "request: messages")
    if parts := unwritten(turns, tokenizer, options):
        raise invalid(
            f"the model's chat template leaves out {parts}; say it in a user's message", "messages"
        )
    return chat_ids(turns, tokenizer, options, limit=limit)
