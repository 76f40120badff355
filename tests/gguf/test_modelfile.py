"""Ollama writes chats as the model's own template does, and stops where answers end."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from family_templates import FAMILY_TEMPLATES
from go_template import execute

from qlora_kit.base.source import TINY
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.data.answers import turn_ends
from qlora_kit.data.chat_template import DIRECTORY, NO_OPTIONS
from qlora_kit.gguf.chat_form import chat_form
from qlora_kit.gguf.modelfile import modelfile

OURS = {path.stem: path.read_text() for path in sorted(DIRECTORY.glob("*.jinja"))}
BRACES = "{% for m in messages %}{{ m.role + '{{x}} {{ y' + m.content }}{% endfor %}{{ '{{' }}"
TEMPLATES = {f"our {name}": text for name, text in OURS.items()} | FAMILY_TEMPLATES
TEMPLATES |= {"braces": BRACES}
# A brace before each action: Go reads `{{{` as `{{` and a `{` that it does not know.
TEMPLATES |= {"a brace": "{% for m in messages %}{{ '[{' + m.content + '}{{{' }}{% endfor %}{"}


def chats() -> list[list[dict[str, str]]]:
    """With and without a system text, of one to four turns."""
    texts = ("Hi", "Hello there!", "Sum 2 + 2:\n\n\tnow", "4 🙂", "{{ .Content }}", "No", "Bye")
    roles = ("user", "assistant")
    return [
        [*before, *({"role": roles[i % 2], "content": texts[i]} for i in range(length))]
        for length in (1, 3, 5, 7)
        for before in ([], [{"role": "system", "content": "Be brief.\nBe kind."}])
    ]


def expected(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """transformers' text; a system text that is refused stands before the first user's."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:
        both = f"{chat[0]['content']}\n\n{chat[1]['content']}"
        return expected(tokenizer, [{"role": "user", "content": both}, *chat[2:]])
    return str(text)


def template_of(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*)"""\n\Z', text, re.DOTALL | re.MULTILINE)
    assert found, text
    return found[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_go_template_writes_what_the_chat_template_does(name: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    text = template_of(modelfile(tokenizer, [1], 512, model="model.gguf"))
    for chat in chats():
        assert execute(text, chat) == expected(tokenizer, chat).removeprefix("<s>"), chat


def test_bos_is_in_the_template_where_nobody_else_puts_it() -> None:
    tokenizer = chat_tokenizer(adds_bos=False)
    tokenizer.chat_template = OURS["llama-3"]
    text = template_of(modelfile(tokenizer, [1], 512, model="model.gguf"))
    for chat in chats():
        assert execute(text, chat) == expected(tokenizer, chat)


def test_the_day_of_a_template_is_said() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = FAMILY_TEMPLATES["llama-3.1"]
    day = datetime.datetime.now().date().isoformat()
    text = modelfile(tokenizer, [1], 512, model="model.gguf")
    assert f"# It writes the day, here {day}: change it in the text below.\n" in text
    assert "It writes the day" not in modelfile(load_tokenizer(TINY), [1], 512, model="model.gguf")


@pytest.mark.parametrize(
    "template",
    [
        # Turns are counted, messages are changed, the last message is left out.
        "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.content | upper }}{% endfor %}",
        "{% for m in messages[:-1] %}{{ m.role + m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        # What Ollama's file cannot hold.
        "{% for m in messages %}{{ m.content + '\u200b' }}{% endfor %}",
        '{% for m in messages %}{{ m.content + \'"""\' }}{% endfor %}',
    ],
)
def test_a_template_of_no_known_form_is_left_out_and_that_is_said(template: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    quotable = not any(one in template for one in ("\u200b", '"'))
    assert (chat_form(tokenizer, NO_OPTIONS) is None) == quotable
    text = modelfile(tokenizer, [1], 512, model="model.gguf")
    assert "\nTEMPLATE" not in text
    assert "# No TEMPLATE: " in text


def test_a_modelfile_says_the_file_the_stops_and_the_context() -> None:
    tokenizer = load_tokenizer(TINY)
    ends = turn_ends(tokenizer) | {tokenizer.eos_token_id}
    lines = modelfile(tokenizer, ends, 1024, model="model.gguf").splitlines()
    assert lines[:4] == [
        "FROM ./model.gguf",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|end|>"',
        "PARAMETER num_ctx 1024",
    ]
    adapter = modelfile(tokenizer, ends, None, model="llama3.2", adapter="adapter.gguf")
    of, _, adapter = adapter.partition("\n")
    assert of == "# The model that the adapter was trained on, as a GGUF."
    assert adapter.startswith("FROM llama3.2\nADAPTER ./adapter.gguf\nPARAMETER stop")


def test_a_model_without_chats_goes_on_with_its_prompt(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    assert modelfile(tokenizer, [1], 512, model="m.gguf").endswith('\nTEMPLATE "{{ .Prompt }}"\n')
