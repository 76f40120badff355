"""What a chat template would leave out of messages that are to be answered.

Training skips a row of which the template does not write a part; a request, or a turn of a chat,
is refused for the same. That the text of a message stands somewhere in the prompt does not say
that the message does, as "Be" does in "Be my guest": the messages are rendered once more with
other texts in the place of theirs, which occur nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions
from qlora_kit.data.rendering import SYSTEM, Messages, Renderer, is_written
from qlora_kit.data.tokens import Tokens
from qlora_kit.data.turns import left_out, unread
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unwritten(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, options: ChatOptions = NO_OPTIONS
) -> str:
    """The parts of a chat that its template does not write, in words; empty where there are none.

    Not named are ids of calls and what a tool's answer says of its tool, which clients have to
    send, which every template may leave to the order of the messages; nor thoughts of earlier
    turns, which templates that know thoughts take out.
    Errors: `DataError` and others of the template.
    """
    template = Renderer(Tokens(tokenizer), "prompt", options)
    adapted = template.adapted(messages)
    if parts := left_out(adapted, None, template.text):
        return parts
    spoken = [message for message in messages if message["role"] != "tool"]
    if "messages[].name" in unread(spoken, template.text):
        return "the name of a message"
    text = template.render(adapted, header=True).text
    absent = [at for at, message in enumerate(messages) if not is_written(message, text)]
    if not absent:
        probes = [f"text{at}of{len(messages)}" for at in range(len(messages))]
        other = [
            {**message, "content": probe} if message.get("content", "").strip() else message
            for message, probe in zip(messages, probes, strict=True)
        ]
        try:
            text = template.render(template.adapted(other), header=True).text
        except DataError:  # a template that reads something out of its texts
            return ""
        absent = [at for at, message in enumerate(other) if not is_written(message, text)]
    return ", ".join(
        "the system message"
        if messages[at]["role"] in SYSTEM
        else f"messages[{at}] of the role {messages[at]['role']}"
        for at in absent[:3]
    )
