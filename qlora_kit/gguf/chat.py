"""The chat templates of a tokenizer as the keys of a GGUF."""

from __future__ import annotations

import re
from string import ascii_letters, digits
from typing import Any

from qlora_kit.data.chat_template import templates_of

TEMPLATE = "tokenizer.chat_template"
TEMPLATES = "tokenizer.chat_templates"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def chat_metadata(tokenizer: Any) -> list[tuple[str, str | list[str]]]:
    """Keys and values: the default template, each other one by its name, and their names.

    They are those of the tokenizer as it was trained with, a run's own included.
    """
    texts = {name: without_marks(text) for name, text in templates_of(tokenizer).items()}
    found: list[tuple[str, str | list[str]]] = []
    if "default" in texts:
        found.append((TEMPLATE, texts.pop("default")))
    named = {_plain(name): text for name, text in texts.items()}
    found += [(f"{TEMPLATE}.{name}", text) for name, text in sorted(named.items())]
    return [*found, (TEMPLATES, sorted(named))] if named else found


def without_marks(template: str) -> str:
    """A template without transformers' own `{% generation %}`, which marks what is trained on.

    A condition that always holds stands in its place: it takes the same blanks away around it.
    """
    return GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template
    )


def _plain(name: str) -> str:
    return "".join(one if one in ascii_letters + digits else "_" for one in name)
