"""Chats of every kind over the chat templates of real families: ids and labels against references.

Ids must be those of transformers' `apply_chat_template(tokenize=True)`, of the whole chat or, where
a template writes earlier turns otherwise, of the chat up to each trained turn. Labels are judged by
a masker written apart: what stands between a family's own header and its end token, found in the
rendered text by a regular expression. Of any template it must hold that a trained turn begins where
the template's own generation prompt ends, has the answer in it, and ends with a token at which
generation stops. The table has family x chats x equal, and every difference.

The families' templates are not part of the project. They lie in public packages: the source
distribution of llama-cpp-python (models/templates/*.jinja) and trl.

    python benchmarks/templates.py --templates DIR --tokenizer DIR   # two minutes; DIR: vocab, merges
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from record import make_parser, write_result  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast  # noqa: E402

from qlora_kit.data.answers import chat_ids, turn_ends  # noqa: E402
from qlora_kit.data.encode import encode  # noqa: E402
from qlora_kit.data.rows import Row  # noqa: E402
from qlora_kit.data.tokens import Encoded, Skipped  # noqa: E402
from qlora_kit.errors import QloraKitError  # noqa: E402

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


def inlined(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thoughts in its text."""
    thoughts = message.pop("reasoning_content", None)
    if thoughts:
        message["content"] = f"<think>\n{thoughts}\n</think>\n\n{message['content']}"
    return message


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


def main() -> None:
    parser = make_parser(__doc__, "templates")
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--only", help="files with this in their name; nothing is recorded")
    parser.add_argument("--all", action="store_true", help="families without a masker as well")
    asked = parser.parse_args()
    table: dict[str, dict[str, Any]] = {}
    for path in sorted(asked.templates.glob("*.jinja")):
        if asked.only and asked.only not in path.name:
            continue
        family = next((one for one in FAMILIES if one.files in path.name), None)
        if family is None and not (asked.all or asked.only):
            continue
        template = path.read_text(encoding="utf-8")
        outcomes: collections.Counter[str] = collections.Counter()
        differences = {}
        for split in ("GPT-2", "Llama 3"):
            tokenizer = tokenizer_of(template, family, asked.tokenizer, split)
            for name, chat in CHATS.items():
                try:
                    outcome = judged(tokenizer, family, chat)
                except Exception as error:
                    outcome = f"failed: {type(error).__name__}: {error}"
                kind = outcome.split(":")[0]
                outcomes[kind] += 1
                if kind not in ("equal", "refused"):
                    differences[f"{name}, {split}"] = outcome
            try:
                chat_ids(said("Hi"), tokenizer)
            except QloraKitError as error:
                differences[f"a prompt, {split}"] = error.problem
        name = path.stem if family is None else family.name
        table[name] = {
            "labels": family is not None,
            "chats": 2 * len(CHATS),
            **outcomes,
            "differences": differences,
        }
        print(f"{name:60} {dict(outcomes)}", flush=True)
        if asked.only:
            print(json.dumps(differences, indent=1, ensure_ascii=False))
    if not asked.only:
        print(write_result(asked, {"chats": list(CHATS), "table": table}))


if __name__ == "__main__":
    main()
