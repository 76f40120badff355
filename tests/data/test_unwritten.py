"""Messages that a chat template would not write are named, and those that it writes are not."""

import pytest
from chat_tokenizer import chat_tokenizer

from qlora_kit.data.answers import unwritten
from qlora_kit.data.chat_template import ChatOptions

PLAIN = "{% for m in messages %}[{{ m.role }}: {{ m.content | trim }}]{% endfor %}"
USERS = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
# A tool's answer is in neither branch.
PAIRS = (
    "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% elif m.role == 'assistant' "
    "%}A{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
TOOLS = PAIRS.replace("{% endif %}", "{% else %}{{ m.content | tojson }}{% endif %}")
FIRST_REFUSED = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"

USER = {"role": "user", "content": "Be my guest."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "x"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"a": "\\"b"}', "tool_call_id": "x", "name": "f"}


def said(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (PLAIN, [said(" Be.\n"), USER, {"role": "assistant", "content": ""}, USER], ""),
        (PLAIN, [USER, CALLING, RESULT], "tool_calls"),
        (PLAIN, [USER, {"role": "assistant", "content": "A", "reasoning": "B"}, USER], "reasoning"),
        (PLAIN, [{**USER, "name": "Ruth"}], "the name of a message"),
        (USERS, [said("Be"), USER], "the system message"),
        (USERS, [said("Be brief."), USER], "the system message"),
        (USERS, [USER, {"role": "assistant", "content": "guest"}, USER], "messages[1] of the role"),
        (PAIRS, [USER, CALLING, RESULT], "messages[2] of the role tool"),
        (TOOLS, [USER, CALLING, RESULT], ""),
        ("{{ messages[-1].content }}", [USER, USER], "messages[0] of the role user"),
    ],
)
def test_what_the_template_does_not_write_is_named(template, messages, named) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    found = unwritten(messages, tokenizer)
    assert found.startswith(named)
    assert bool(found) == bool(named)


def test_a_system_text_that_is_put_before_the_users_is_written() -> None:
    tokenizer = chat_tokenizer()
    for template in (FIRST_REFUSED + PLAIN, USERS):
        tokenizer.chat_template = template
        assert unwritten([said("Be"), USER], tokenizer, ChatOptions(merge_system=True)) == ""
