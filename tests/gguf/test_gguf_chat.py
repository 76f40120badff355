"""The chat templates of a GGUF write what the tokenizer's do, without transformers' own marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from family_templates import FAMILY_TEMPLATES
from gguf_reader import Reader, write_vocabulary

from qlora_kit.base.source import TINY
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.data.chat_template import DIRECTORY
from qlora_kit.gguf.vocabulary import chat_metadata, vocabulary, without_marks

TINYS = (TINY / "chat_template.jinja").read_text()
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello \n"},
    {"role": "user", "content": "Bye"},
]
MARKED = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {% generation %}
        {{ m.content }}
        {%- set x = 1 %}
        {%-endgeneration-%}
    {% else %}
    {% generation -%}   {{ m.content }}   {%+ endgeneration +%}
    {% endif %}
{% endfor %}"""


@pytest.mark.parametrize("template", [TINYS, MARKED])
def test_a_template_without_marks_writes_the_same(template: str) -> None:
    tokenizer = chat_tokenizer()
    plain = without_marks(template)
    assert "generation " not in plain.replace("add_generation_prompt ", "")
    for header in (False, True):
        both = [
            tokenizer.apply_chat_template(
                CHAT, chat_template=text, tokenize=False, add_generation_prompt=header
            )
            for text in (template, plain)
        ]
        assert both[0] == both[1]


def test_a_template_without_marks_stays_as_it_is() -> None:
    for text in (*FAMILY_TEMPLATES.values(), *(p.read_text() for p in DIRECTORY.glob("*.jinja"))):
        assert without_marks(text) == text


def test_llama_cpp_writes_chats_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    found = vocabulary(tokenizer, len(tokenizer), [1])
    write_vocabulary(found, tmp_path / "model.gguf", more=chat_metadata(tokenizer))
    reader = Reader(tmp_path / "model.gguf")
    for chat in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], CHAT[:1]):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert reader.chat(chat) == text.removeprefix("<s>")


def test_named_templates_stand_beside_the_default() -> None:
    tokenizer: Any = chat_tokenizer()
    assert chat_metadata(tokenizer) == []
    tokenizer.chat_template = {"default": "a", "tool_use": "b{%- generation %}", "r-ag": "c"}
    assert chat_metadata(tokenizer) == [
        ("tokenizer.chat_template", "a"),
        ("tokenizer.chat_template.r_ag", "c"),
        ("tokenizer.chat_template.tool_use", "b{%- if true %}"),
        ("tokenizer.chat_templates", ["r_ag", "tool_use"]),
    ]
    assert [key for key, _ in chat_metadata(load_tokenizer(TINY))] == ["tokenizer.chat_template"]
