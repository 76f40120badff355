"""Whether an encoded chat is what it should be, and if not, what differs."""

from __future__ import annotations

import re
from typing import Any

from qlora_kit.data.answers import turn_ends
from qlora_kit.data.encode import encode
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Encoded, Skipped
from qlora_kit.errors import QloraKitError
from templates_parts.chats import A
from templates_parts.families import ENDS, Family


def inlined(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thoughts in its text."""
    thoughts = message.pop("reasoning_content", None)
    if thoughts:
        message["content"] = f"<think>\n{thoughts}\n</think>\n\n{message['content']}"
    return message


def judged(tokenizer: Any, family: Family | None, chat: dict[str, Any]) -> str:
    """What comes of one chat: `equal`, `refused` by both, `skipped: why`, or what differs."""
    messages = [dict(message) for message in chat["messages"]]
    weighted = [dict(message) for message in messages]
    for index, weight in chat.get("weights", {}).items():
        weighted[index]["weight"] = weight
    tools = chat.get("tools")
    content = {"messages": [dict(one) for one in weighted], **({"tools": tools} if tools else {})}
    template = tokenizer.chat_template
    if "</think>" in template and not re.search(
        r"\.(reasoning|thinking)|['\"](reasoning\w*|thinking)['\"]", template
    ):
        # Such a template looks for thoughts in the text: that is where a model writes them.
        messages = [inlined(message) for message in messages]

    def upstream(part: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                part, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        )

    try:
        upstream(messages)
        refused = False
    except Exception:
        refused = True
    try:
        found = encode(Row(content, "chat", 1), tokenizer, 10**6)
    except QloraKitError as error:
        if refused:
            return "refused"
        return f"error: {error.problem[:160]}"
    if isinstance(found, Skipped):
        return f"skipped: {found.reason}"
    trained = [i for i, m in enumerate(weighted) if m["role"] == A and m.get("weight", 1)]
    if (len(found) == 1 and len(trained) > 1) or (len(found) == 1 and weighted[-1]["role"] != A):
        ways = [(found[0], messages, trained)]
    elif len(found) == len(trained):
        # A row for each trained turn, with the messages up to it.
        ways = [(one, messages[: i + 1], [i]) for one, i in zip(found, trained, strict=True)]
        if len(found) == 1 and tokenizer.decode(found[0].input_ids) == upstream(messages):
            ways = [(found[0], messages, trained)]
    else:
        return f"{len(found)} rows of {len(trained)} turns"
    for one, part, learnt in ways:
        difference = compared(tokenizer, family, one, part, learnt, upstream)
        if difference:
            return difference
    return "equal"


def compared(
    tokenizer: Any,
    family: Family | None,
    one: Encoded,
    messages: list[dict[str, Any]],
    learnt: list[int],
    upstream: Any,
) -> str | None:
    """What is different in one encoded row, in words."""
    text = upstream(messages)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], whole["offset_mapping"]
    prompts = [upstream(messages[:i], True) for i in learnt]
    behind = not all(text.startswith(prompt) for prompt in prompts)
    if behind:
        # The turn is trained behind the prompt that the model is given.
        text = tokenizer.decode(one.input_ids)
        if len(learnt) != 1 or not text.startswith(prompts[0]):
            return "neither the chat nor the prompt is the beginning"
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
    if one.input_ids != ids:
        return f"ids: {tokenizer.decode(one.input_ids)[-80:]!r} for {text[-80:]!r}"
    if (
        one.labels[-1] == -100
        and messages[-1]["role"] == A
        and not any(label != -100 for label in one.labels[-4:])
    ):
        return "the end is not trained"
    ends = turn_ends(tokenizer)
    last = [label for label in one.labels if label != -100][-1]
    has_end = any(end in text for end in (family.ends if family else ENDS))
    if has_end and last not in ends:
        return f"stops at {[tokenizer.decode([i]) for i in ends]}, trained {tokenizer.decode([last])!r}"
    if len(learnt) == 1 and not behind:
        begin = len(prompts[0])
        crossing = any(a < begin < b for a, b in offsets)
        shown = tokenizer.decode(
            one.input_ids[: next(i for i, label in enumerate(one.labels) if label != -100)]
        )
        if (
            shown != prompts[0]
            and not crossing
            and "{% generation" not in tokenizer.chat_template
            and "{%- generation" not in tokenizer.chat_template
        ):
            return f"trained behind {shown[-60:]!r}, prompted with {prompts[0][-60:]!r}"
    if family is None:
        return None
    # The masker written apart.
    spans = []
    for match in re.finditer(family.header, text):
        closings = [
            text.find(end, match.end()) + len(end)
            for end in family.ends
            if end in text[match.end() :]
        ]
        if closings:
            spans.append((match.end(), min(closings)))
    turns = [i for i, m in enumerate(messages) if m["role"] == A]
    if family.name == "gpt-oss" or family.name.startswith(("Mistral", "Devstral")):
        spans = spans[-len(turns) :]
    if len(spans) != len(turns):
        return f"the masker finds {len(spans)} of {len(turns)} turns"
    if len(prompts) == 1:
        spans[turns.index(learnt[0])] = (len(prompts[0]), spans[turns.index(learnt[0])][1])
    wanted = [spans[turns.index(i)] for i in learnt]
    labels = [
        token if any(a < last and b > first for first, last in wanted) and place else -100
        for place, (token, (a, b)) in enumerate(zip(ids, offsets, strict=True))
    ]
    if family.name.startswith("Phi 3") and text.endswith("<|endoftext|>"):
        # What stands behind the last end is trained too: both end the answer.
        count = len(labels) - next(
            i
            for i in range(len(ids) - 1, -1, -1)
            if ids[i] == tokenizer.convert_tokens_to_ids("<|end|>")
        )
        labels[-count:] = ids[-count:]
    if one.labels != labels:
        ours, theirs = (
            tokenizer.decode([t for t in found if t != -100]) for found in (one.labels, labels)
        )
        return f"labels: {ours[:90]!r} for {theirs[:90]!r}"
    return None
