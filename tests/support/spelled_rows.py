"""Rows in the spellings that files have, and by hand what the model reads: [[ ]] is trained on.

The template of these rows writes every part by name, so that what is lost is missed. `same` names
the rows that say the same; `unused` are the fields that nothing may read.
"""

U, A = "<|im_start|>user\n", "<|im_start|>assistant\n"
END = "<|im_end|>\n"

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}) {% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}@{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% if m.name %}#{{ m.name }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*turns, **more):
    return {"messages": [{"role": r, "content": c, **x} for r, c, x in turns], **more}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": r, "value": c} for r, c in turns], **more}


def corrected(**mark):
    """A wrong answer that a field takes out of training, and a right one."""
    return chat(
        ("user", "2+2?", {}), ("assistant", "5", mark), ("user", "No.", {}), ("assistant", "4", {})
    )


def calling(call, **more):
    messages = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", **call}]
    return {"messages": messages, **more}


def function(arguments):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


CORRECTED = f"<s>{U}2+2?{END}{A}5{END}{U}No.{END}{A}[[4<|im_end|>]]\n"
HELLO = f"<s>{U}Hi{END}{A}[[Hello<|im_end|>]]\n"
PIRATE = f"<s><|im_start|>system\nBe a pirate.{END}{U}Hi{END}{A}[[Hello<|im_end|>]]\n"
THOUGHT = f"<s>{U}Hi{END}{A}[[(hm) Hello<|im_end|>]]\n"
CALL = f'<s>{U}Oslo?{END}{A}[[@look{{"city": "Oslo"}}<|im_end|>]]\n'
TWO_CALLS = f'<s>{U}Oslo?{END}{A}[[@look{{"city": "Oslo"}}@look{{"city": "Rome"}}<|im_end|>]]\n'
TOOL = '{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}'
WITH_TOOL = f"<s><|im_start|>tools\n[{TOOL}]{END}{U}Hi{END}{A}[[Hello<|im_end|>]]\n"
RESULT = (
    f'<s>{U}Oslo?{END}{A}[[@look{{"city": "Oslo"}}<|im_end|>]]\n<|im_start|>tool\nrain{END}'
    f"{A}[[Rain.<|im_end|>]]\n"
)
HI = (("user", "Hi", {}), ("assistant", "Hello", {}))
BARE_TOOL = {"name": "look", "parameters": {"type": "object"}}
LOOK = '{"name": "look", "arguments": {"city": "Oslo"}}'
OSLO, ROME = {"city": "Oslo"}, {"city": "Rome"}
TEXT_PART = {"type": "text", "text": "Hi"}
ALPACA = "<s>### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n[[3</s>]]"

ROWS = [
    # --- whether a turn is trained on
    ("weight", corrected(weight=0), CORRECTED, ()),
    ("train", corrected(train=False), CORRECTED, ()),
    ("trainable", corrected(trainable=False), CORRECTED, ()),
    ("training", corrected(training=False), CORRECTED, ()),
    ("loss", corrected(loss=False), CORRECTED, ()),
    ("loss as a number", corrected(loss=0.0), CORRECTED, ()),
    ("loss_mask", corrected(loss_mask=0), CORRECTED, ()),
    ("loss_weight", corrected(loss_weight=0), CORRECTED, ()),
    ("two that agree", corrected(loss=False, weight=0), CORRECTED, ()),
    (
        "true trains",
        chat(("user", "Hi", {"train": False}), ("assistant", "Hello", {"train": True})),
        HELLO,
        (),
    ),
    (
        "null trains",
        chat(("user", "Hi", {"train": None}), ("assistant", "Hello", {"weight": None})),
        HELLO,
        (),
    ),
    # --- spellings of a chat
    ("messages", chat(*HI), HELLO, ()),
    ("sharegpt", sharegpt(("human", "Hi"), ("gpt", "Hello")), HELLO, ()),
    ("sharegpt roles", sharegpt(("user", "Hi"), ("chatgpt", "Hello")), HELLO, ()),
    ("conversations of roles", {"conversations": chat(*HI)["messages"]}, HELLO, ()),
    (
        "messages of from",
        {"messages": sharegpt(("human", "Hi"), ("gpt", "Hello"))["conversations"]},
        HELLO,
        (),
    ),
    (
        "trl",
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
        HELLO,
        (),
    ),
    (
        "trl with an earlier answer",
        {"prompt": corrected()["messages"][:3], "completion": corrected()["messages"][3:]},
        CORRECTED,
        (),
    ),
    (
        "parts",
        chat(
            ("user", [TEXT_PART], {}),
            ("assistant", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], {}),
        ),
        HELLO,
        (),
    ),
    (
        "parts of the other api",
        chat(
            ("user", [{"type": "input_text", "text": "Hi"}], {}),
            ("assistant", [{"type": "output_text", "text": "Hello", "annotations": [1]}], {}),
        ),
        HELLO,
        ("messages[].content[].annotations",),
    ),
    # --- system
    ("system turn", chat(("system", "Be a pirate.", {}), *HI), PIRATE, ()),
    ("system of the row", chat(*HI, system="Be a pirate."), PIRATE, ()),
    (
        "system of a sharegpt row",
        sharegpt(("human", "Hi"), ("gpt", "Hello"), system="Be a pirate."),
        PIRATE,
        (),
    ),
    (
        "system twice the same",
        chat(("system", "Be a pirate.", {}), *HI, system="Be a pirate."),
        PIRATE,
        (),
    ),
    ("system_prompt", chat(*HI, system_prompt="Be a pirate."), PIRATE, ()),
    ("developer", chat(("developer", "Be a pirate.", {}), *HI), PIRATE, ()),
    ("empty system", chat(*HI, system=""), HELLO, ()),
    # --- thoughts
    (
        "reasoning_content",
        chat(HI[0], ("assistant", "Hello", {"reasoning_content": "hm"})),
        THOUGHT,
        (),
    ),
    ("reasoning", chat(HI[0], ("assistant", "Hello", {"reasoning": "hm"})), THOUGHT, ()),
    ("thinking", chat(HI[0], ("assistant", "Hello", {"thinking": "hm"})), THOUGHT, ()),
    (
        "thinking as a part",
        chat(
            HI[0],
            (
                "assistant",
                [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}],
                {},
            ),
        ),
        THOUGHT,
        (),
    ),
    ("empty thoughts", chat(HI[0], ("assistant", "Hello", {"thinking": ""})), HELLO, ()),
    # --- calls
    ("arguments", calling({"tool_calls": [function(OSLO)]}), CALL, ()),
    (
        "arguments as text",
        calling({"content": None, "tool_calls": [function('{"city": "Oslo"}')]}),
        CALL,
        (),
    ),
    ("empty content", calling({"content": "", "tool_calls": [function(OSLO)]}), CALL, ()),
    ("bare call", calling({"tool_calls": [{"name": "look", "arguments": OSLO}]}), CALL, ()),
    (
        "bare call with an id",
        calling({"tool_calls": [{"id": "1", "name": "look", "parameters": OSLO, "state": "done"}]}),
        CALL,
        ("messages[].tool_calls[].state",),
    ),
    (
        "calls as text",
        calling({"tool_calls": '[{"name": "look", "arguments": {"city": "Oslo"}}]'}),
        CALL,
        (),
    ),
    (
        "function_call",
        calling({"function_call": {"name": "look", "arguments": '{"city": "Oslo"}'}}),
        CALL,
        (),
    ),
    ("two calls", calling({"tool_calls": [function(OSLO), function(ROME)]}), TWO_CALLS, ()),
    (
        "null arguments",
        calling({"tool_calls": [function({"city": "Oslo", "day": None})]}),
        CALL,
        (),
    ),
    (
        "a null that the text of arguments has",
        calling({"tool_calls": [function('{"city": "Oslo", "day": null}')]}),
        CALL.replace('"Oslo"', '"Oslo", "day": null'),
        (),
    ),
    ("sharegpt call", sharegpt(("human", "Oslo?"), ("function_call", LOOK)), CALL, ()),
    (
        "sharegpt call with text in text",
        sharegpt(
            ("human", "Oslo?"),
            ("function_call", '{"name": "look", "arguments": "{\\"city\\": \\"Oslo\\"}"}'),
        ),
        CALL,
        (),
    ),
    (
        "sharegpt calls",
        sharegpt(
            ("human", "Oslo?"),
            (
                "tool_call",
                '[{"name": "look", "arguments": {"city": "Oslo"}}, '
                '{"name": "look", "arguments": {"city": "Rome"}}]',
            ),
        ),
        TWO_CALLS,
        (),
    ),
    (
        "result",
        {
            "messages": [
                *calling({"tool_calls": [function(OSLO)]})["messages"],
                {"role": "tool", "content": "rain", "tool_call_id": "1"},
                {"role": "assistant", "content": "Rain."},
            ]
        },
        RESULT,
        (),
    ),
    (
        "function role",
        {
            "messages": [
                *calling({"function_call": {"name": "look", "arguments": OSLO}})["messages"],
                {"role": "function", "content": "rain"},
                {"role": "assistant", "content": "Rain."},
            ]
        },
        RESULT,
        (),
    ),
    (
        "observation",
        sharegpt(
            ("human", "Oslo?"), ("function_call", LOOK), ("observation", "rain"), ("gpt", "Rain.")
        ),
        RESULT,
        (),
    ),
    (
        "sharegpt tool",
        sharegpt(("human", "Oslo?"), ("function_call", LOOK), ("tool", "rain"), ("gpt", "Rain.")),
        RESULT,
        (),
    ),
    # --- tools
    ("tools", chat(*HI, tools=[{"type": "function", "function": BARE_TOOL}]), WITH_TOOL, ()),
    ("bare tools", chat(*HI, tools=[BARE_TOOL]), WITH_TOOL, ()),
    ("flat tools", chat(*HI, tools=[{"type": "function", **BARE_TOOL}]), WITH_TOOL, ()),
    ("tools as text", chat(*HI, tools=f"[{TOOL}]"), WITH_TOOL, ()),
    ("functions", chat(*HI, functions=[BARE_TOOL]), WITH_TOOL, ()),
    (
        "tools of the first message",
        chat(("user", "Hi", {"tools": [BARE_TOOL]}), HI[1]),
        WITH_TOOL,
        (),
    ),
    (
        "tools of a later message",
        chat(HI[0], ("assistant", "Hello", {"tools": [BARE_TOOL]})),
        HELLO,
        ("messages[].tools",),
    ),
    ("null in tools", chat(*HI, tools=[{**BARE_TOOL, "strict": None}]), WITH_TOOL, ()),
    ("no tools", chat(*HI, tools=[]), HELLO, ()),
    # --- Alpaca
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, ALPACA, ()),
    (
        "alpaca system",
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be exact."},
        ALPACA.replace("<s>", "<s>Be exact.\n\n"),
        (),
    ),
    (
        "alpaca history",
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
        ALPACA.replace("<s>", "<s>### Instruction:\nHi\n\n### Response:\nHello\n\n"),
        (),
    ),
    (
        "alpaca history as text",
        {"instruction": "Add", "input": "1 2", "output": "3", "history": '[["Hi", "Hello"]]'},
        ALPACA.replace("<s>", "<s>### Instruction:\nHi\n\n### Response:\nHello\n\n"),
        (),
    ),
    (
        "alpaca without input",
        {"instruction": "Add 1 2", "input": None, "output": "3", "id": 7},
        "<s>### Instruction:\nAdd 1 2\n\n### Response:\n[[3</s>]]",
        ("id",),
    ),
    # --- what nothing reads
    (
        "prompt",
        {"prompt": "a", "completion": "b", "source": "s", "score": 0.5, "note": None},
        "<s>a[[b</s>]]",
        ("source", "score"),
    ),
    ("text", {"text": "ab", "meta": {"x": 1}, "tags": []}, "<s>[[ab</s>]]", ("meta",)),
    ("a chat that says it twice", chat(*HI, text="Hi Hello", id=3), HELLO, ("text", "id")),
    (
        "a turn's own",
        chat(("user", "Hi", {"id": 1, "ts": ""}), ("assistant", "Hello", {"id": 2})),
        HELLO,
        ("messages[].id",),
    ),
]
"""`(name, row, what the model reads, unused fields)`"""

ALIKE = [
    (
        "messages",
        [
            "weight",
            "messages",
            "system of the row",
            "reasoning",
            "arguments",
            "two calls",
            "null arguments",
            "tools",
            "null in tools",
            "result",
        ],
    ),
    ("conversations", ["sharegpt", "sharegpt call", "observation", "system of a sharegpt row"]),
    ("instruction", ["alpaca", "alpaca system", "alpaca history", "alpaca without input"]),
    ("prompt", ["prompt"]),
    ("trl", ["trl", "trl with an earlier answer"]),
]
"""Rows that one table can hold: it gives each the fields of all, null where they have none."""
