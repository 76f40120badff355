"""What an error of data advises works when it is followed."""

import json
import re

import pytest
from chat_tokenizer import chat_tokenizer
from spelled_rows import TEMPLATE

from qlora_kit.config.data import DataConfig
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import load_rows
from qlora_kit.errors import QloraKitError

PAIR = {"prompt": "he", "completion": "on"}
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
LONG = {"prompt": "q" * 99, "completion": "on"}
CALL = {"name": "f", "arguments": {}}


def chat(*messages):
    return {"messages": list(messages)}


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def train(path, content, template=TEMPLATE, **options):
    """The rows of a file with some content, encoded as a run encodes them."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    config = DataConfig(data=str(path), **{"eval_fraction": 0, "max_length": 90, **options})
    rows = load_rows(config, 0)
    return encode_rows(rows.train, tokenizer, config.length_in(90), EncodeRules.of(config))


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

CASES = {
    # (file with its fault, what the remedy says, the file or the options that follow it)
    "no known shape": (
        lines({"question": "he", "answer": "on"}),
        "map them with --columns NAME=FIELD to one of: .*prompt . completion",
        {"columns": "question=prompt,answer=completion"},
    ),
    "a misspelt field": (
        lines({"prompt": "he", "completon": "on"}),
        "--columns completon=completion",
        {"columns": "completon=completion"},
    ),
    "a misspelt field, corrected": (
        lines({"prompt": "he", "completon": "on"}), "correct it", lines(PAIR),
    ),
    "another name": (
        lines({"prompt": "he", "response": "on"}),
        "--columns NAME=completion with one of the names it has",
        {"columns": "response=completion"},
    ),
    "a mapped name that is not there": (
        (lines(PAIR), {"columns": "promt=prompt"}), "correct --columns", {"columns": None},
    ),
    "a field of one row": (
        lines(PAIR, {"prompt": "he"}), 'give every row "completion"', lines(PAIR, PAIR),
    ),
    "a turn without a role": (
        lines(chat({"from": "human"}, HELLO)), 'write "content" there',
        lines(chat({"from": "human", "content": "Hi"}, HELLO)),
    ),
    "no value": (
        lines({"conversations": [{"from": "human"}, {"from": "gpt", "value": "Hello"}]}),
        'write "value" there',
        lines({"conversations": [{"from": "human", "value": "Hi"},
                                 {"from": "gpt", "value": "Hello"}]}),
    ),
    "an unknown role": (
        lines(chat({"role": "usr", "content": "Hi"}, HELLO)), "use .*user", lines(chat(HI, HELLO)),
    ),
    "an answer first": (lines(chat(HELLO)), "start with the user", lines(chat(HI, HELLO))),
    "a system text in the middle": (
        lines(chat(HI, {"role": "system", "content": "s"}, HELLO)), "put one at the start",
        lines(chat({"role": "system", "content": "s"}, HI, HELLO)),
    ),
    "two system texts": (
        lines({**chat({"role": "system", "content": "s"}, HI, HELLO), "system": "t"}),
        "keep one of the two", lines({**chat(HI, HELLO), "system": "t"}),
    ),
    "a user's weight": (
        lines(chat({**HI, "weight": 1}, HELLO)), 'take "weight" out', lines(chat(HI, HELLO)),
    ),
    "half a weight": (
        lines(chat(HI, {**HELLO, "loss_weight": 0.5})), "give 0 or 1",
        lines(chat(HI, {**HELLO, "loss_weight": 1})),
    ),
    "weights that disagree": (
        lines(chat(HI, {**HELLO, "loss": False, "train": True})), "keep one",
        lines(chat(HI, {**HELLO, "train": True})),
    ),
    "a user's call": (
        lines(chat({**HI, "tool_calls": [CALL]}, HELLO)), "only the assistant calls tools",
        lines(chat(HI, {**HELLO, "tool_calls": [CALL]})),
    ),
    "calls as Python prints them": (
        lines(chat(HI, {**HELLO, "tool_calls": str([CALL])})), "write it as JSON",
        lines(chat(HI, {**HELLO, "tool_calls": json.dumps([CALL])})),
    ),
    "a call that is no JSON": (
        lines({"conversations": [{"from": "human", "value": "a"},
                                 {"from": "function_call", "value": "f()"}]}),
        'write {"name": ..., "arguments"',
        lines({"conversations": [{"from": "human", "value": "a"},
                                 {"from": "function_call", "value": json.dumps(CALL)}]}),
    ),
    "a picture": (
        lines(chat(HI, HELLO), chat({"role": "user", "content": [{"type": "image"}]}, HELLO)),
        "take the part, or the row, out", lines(chat(HI, HELLO)),
    ),
    "half a list": (
        lines({"prompt": "he", "completion": [HELLO]}), "write both as text, or both as lists",
        lines({"prompt": [HI], "completion": [HELLO]}),
    ),
    "a history of one": (
        lines({"instruction": "a", "output": "b", "history": [["q"]]}),
        r"give a list of \[question, answer\]",
        lines({"instruction": "a", "output": "b", "history": [["q", "a"]]}),
    ),
    "no turn to train on": (
        lines(chat(HI)), "give every conversation an assistant turn of weight 1",
        lines(chat(HI, {**HELLO, "weight": 1})),
    ),
    "what the template leaves out": (
        (lines(chat(HI, {**HELLO, "thinking": "hm"})), {"template": PLAIN}),
        "use a template", {"template": TEMPLATE},
    ),
    "prompts too long": (
        lines(LONG, LONG, PAIR), "raise --max_length .*with --allow_longer_context",
        {"max_length": 200, "allow_longer_context": True},
    ),
    "prompts too long, dropped": (
        lines(LONG, LONG, PAIR), "--long_rows drop", {"long_rows": "drop"},
    ),
    "all dropped": (
        (lines(*[{"prompt": "q" * 50 + str(n), "completion": "h" * 50} for n in range(3)]),
         {"long_rows": "drop"}),
        "--long_rows truncate", {"long_rows": "truncate"},
    ),
    "none may be long": (
        (lines(LONG, PAIR), {"long_rows": "error"}), "--long_rows truncate or drop",
        {"long_rows": "drop"},
    ),
    "a long line": (
        (lines({"prompt": "he", "completion": "on", "note": "n" * 2**21}),
         {"max_row_size": "1MiB"}),
        "raise --max_row_size", {"max_row_size": "3MiB"},
    ),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "one complete JSON object", lines(PAIR)),
    "NaN": ('{"prompt": "a", "completion": NaN}', "one complete JSON object", lines(PAIR)),
    "UTF-16": (lines(PAIR).encode("utf-16"), "save the file as UTF-8", lines(PAIR)),
    "nothing": ("", "give at least one row", lines(PAIR)),
    "text that is none": (lines({"text": 5}), "give text", lines({"text": "he on"})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_works_when_it_is_followed(tmp_path, name):
    broken, advice, cure = CASES[name]
    content, options = broken if isinstance(broken, tuple) else (broken, {})
    path = tmp_path / "rows.jsonl"
    with pytest.raises(QloraKitError) as caught:
        train(path, content, **options)
    assert re.search(advice, caught.value.remedy), caught.value.remedy
    if isinstance(cure, dict):
        assert train(path, content, **{**options, **cure}).rows
    else:
        assert train(path, cure, **options).rows


def test_no_remedy_names_a_field_of_a_turn_for_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    for turn in ({"value": "Hi"}, {"from": "human"}, {"role": "user"}, {"rol": "user"}):
        with pytest.raises(QloraKitError) as caught:
            train(path, lines({"conversations": [turn]}))
        assert "--columns" not in str(caught.value)


def test_remedies_of_names_work(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(PAIR, PAIR))
    (tmp_path / "valid.jsonl").write_text(lines(PAIR))
    with pytest.raises(QloraKitError) as caught:
        load_rows(DataConfig(data=str(tmp_path), eval_fraction=0.5), 0)
    named = re.search(r"--data (\S+)", caught.value.remedy)[1]
    assert load_rows(DataConfig(data=named, eval_fraction=0.5), 0).evaluation
    assert load_rows(DataConfig(data=str(tmp_path)), 0).evaluation
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "rows.jsonl").write_text(lines(PAIR, PAIR))
    with pytest.raises(QloraKitError, match="name a file in it"):
        load_rows(DataConfig(data=str(empty)), 0)
    assert load_rows(DataConfig(data=str(empty / "rows.jsonl")), 0).train
