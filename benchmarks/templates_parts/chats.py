"""Chats of every kind: turns, systems, scripts, thoughts, calls."""

from __future__ import annotations

from typing import Any

U, A, S, T = "user", "assistant", "system", "tool"
CODE = "def f(x):\n    return x + 1\n\n\nprint(f(2))\n"
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "time", "arguments": {"at": "Rome"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "time",
        "description": "The time at a place.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "a place"}},
            "required": ["at"],
        },
    },
}
THOUGHT = {"role": A, "content": "Four.", "reasoning_content": "Two and two."}
INLINE = {"role": A, "content": "<think>\nTwo and two.\n</think>\n\nFour."}
CALLING = {"role": A, "content": "", "tool_calls": [CALL]}
TOLD = {"role": T, "content": '{"time": "noon"}', "name": "time", "tool_call_id": "abcdefghi"}


def said(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A chat of these texts, the user's first."""
    first = [{"role": S, "content": system}] if system is not None else []
    return first + [
        {"role": A if number % 2 else U, "content": text} for number, text in enumerate(texts)
    ]


CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": said("Hi", "Hello")},
    "two turns": {"messages": said("Hi", "Hello", "Bye", "See you")},
    "three turns": {"messages": said("a", "b", "c", "d", "e", "f")},
    "five turns": {"messages": said(*(f"Say {n}" if n % 2 == 0 else f"{n}!" for n in range(10)))},
    "system": {"messages": said("Hi", "Hello", system="Be brief.")},
    "system, two turns": {"messages": said("Hi", "Hello", "Bye", "Ciao", system="Be brief.")},
    "long system": {"messages": said("Hi", "Hello", system="You are kind.\n\n- be\n- brief\n")},
    "empty system": {"messages": said("Hi", "Hello", system="")},
    "ends with a user": {"messages": said("Hi", "Hello", "Bye")},
    "empty answer": {"messages": said("Say nothing", "")},
    "empty question": {"messages": said("", "What?")},
    "blank answer": {"messages": said("Say blanks", "  \n ")},
    "blanks around": {"messages": said(" Hi ", " Hello ", "\nBye\n", "\nSee you\n")},
    "line ends in front": {"messages": said("Hi", "\n\nHello")},
    "line ends behind": {"messages": said("Hi", "Hello\n\n")},
    "code": {"messages": said("Write f", f"```python\n{CODE}```", "Only code", CODE)},
    "indented": {"messages": said("Write", "    return 1\n\treturn 2")},
    "Chinese": {"messages": said("你好，你是谁？", "我是一个助手。", "谢谢", "不客气！")},
    "Arabic": {"messages": said("مرحبا", "أهلا وسهلا")},
    "Hindi": {"messages": said("नमस्ते", "नमस्ते, कैसे हैं आप?")},
    "emoji": {"messages": said("🙂", "👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301")},
    "mixed": {"messages": said("Übersetze: здравствуй", "Grüß Gott — ¡hola!")},
    "markup": {"messages": said("<b>&amp;</b> 'x' \"y\"", "<i>{{ m }}</i> {% if %} \\n")},
    "roles as words": {"messages": said("user\nassistant", "assistant: user:\nsystem")},
    "json": {"messages": said('{"a": [1, null]}', '{"b": "\\u00e9\\n"}')},
    "long": {"messages": said("word " * 300, "another " * 300)},
    "numbers": {"messages": said("1234567890 + 1", "1234567891", "0.1 + 0.2", "0.30000000000000004")},
    "weight": {"messages": [*said("a", "b"), *said("c", "d")], "weights": {1: 0}},
    "thoughts": {"messages": [*said("2 + 2?"), THOUGHT]},
    "thoughts, two turns": {"messages": [*said("2 + 2?"), THOUGHT, *said("Again"), THOUGHT]},
    "thoughts once": {"messages": [*said("2 + 2?"), THOUGHT, *said("Bye", "Ciao")]},
    "thoughts in the text": {"messages": [*said("2 + 2?"), INLINE]},
    "thoughts in two texts": {"messages": [*said("2 + 2?"), INLINE, *said("Again"), INLINE]},
    "tools unused": {"messages": said("Hi", "Hello"), "tools": [TOOL]},
    "a call": {"messages": [*said("Time in Rome?"), CALLING], "tools": [TOOL]},
    "a call and an answer": {
        "messages": [*said("Time in Rome?"), CALLING, TOLD, {"role": A, "content": "Noon."}],
        "tools": [TOOL],
    },
    "a call in a second turn": {
        "messages": [
            *said("Hi", "Hello", "Time in Rome?"),
            CALLING,
            TOLD,
            {"role": A, "content": "Noon."},
            *said("Thanks", "Sure"),
        ],
        "tools": [TOOL],
    },
    "system and a call": {
        "messages": [*said("Time in Rome?", system="Be brief."), CALLING, TOLD,
                     {"role": A, "content": "Noon."}],
        "tools": [TOOL],
    },
}  # fmt: skip
