"""Ollama's `Modelfile` beside a GGUF: which file, where answers stop, how chats are written.

Ollama takes what a GGUF says of its tokens and not all of its chat template: it has templates in
Go's language, and one of its own for what it does not know. So the template is written in that
language where the form of the model's is known (`chat_form.py`); where it is not, the file says so.

Source: Ollama's docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_kit.config.data import DataConfig
from qlora_kit.data.chat_template import NO_OPTIONS, ChatOptions, chat_options, date_of
from qlora_kit.data.tokens import decoded
from qlora_kit.files.atomic import write_file
from qlora_kit.gguf.chat_form import chat_form

MODELFILE = "Modelfile"
MOST_CONTEXT = 8192
"""Tokens of context that it asks for at most: Ollama allocates its cache for all."""


def write_modelfile(
    directory: Path,
    tokenizer: Any,
    ends: Collection[int],
    context: int,
    *,
    model: str,
    adapter: str | None = None,
    chats: DataConfig | None = None,
) -> None:
    """Write `modelfile` into a directory; `chats` are a run's options, None: there was none."""
    options = NO_OPTIONS if chats is None else chat_options(chats)
    text = modelfile(tokenizer, ends, context, model=model, adapter=adapter, options=options)
    write_file(directory / MODELFILE, text.encode())


def modelfile(
    tokenizer: Any,
    ends: Collection[int],
    context: int | None,
    *,
    model: str,
    adapter: str | None = None,
    options: ChatOptions = NO_OPTIONS,
) -> str:
    """The text of a `Modelfile` for the GGUF `model`, or for an `adapter` on it.

    `ends` are the tokens at which answers stop, `context` is the model's, in tokens; `options` are
    those of the run about its chats.
    """
    lines = [] if adapter is None else ["# The model that the adapter was trained on, as a GGUF."]
    lines.append(f"FROM {_place(model)}")
    if adapter is not None:
        lines.append(f"ADAPTER {_place(adapter)}")
    stops = sorted(filter(None, (decoded(tokenizer, [one]) for one in ends)))
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stops if _can_be_quoted(text)]
    if context is not None:
        lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    return "\n".join([*lines, *_template(tokenizer, options)]) + "\n"


def _template(tokenizer: Any, options: ChatOptions) -> list[str]:
    """The lines about the template."""
    if not tokenizer.chat_template:
        return ["# A model without chats: it goes on with the prompt.", 'TEMPLATE "{{ .Prompt }}"']
    # The GGUF asks for BOS where the tokenizer puts it, and the template then has none.
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    form = chat_form(tokenizer, options, tokenizer.bos_token if adds_bos else "")
    if form is None:
        return [
            "# No TEMPLATE: the model's chat template (tokenizer.chat_template of the GGUF) writes",
            "# chats in a way that is not known in Go's language. Without one Ollama chooses one",
            "# itself: chat through llama.cpp, or write TEMPLATE here by hand.",
        ]
    text = form.go()
    if not _can_be_quoted(text):
        return ["# No TEMPLATE: the model's chat template writes what cannot be quoted here."]
    said = ["# As the model's chat template writes chats; tools are left out."]
    day = date_of(tokenizer, options.date)
    if day is not None:
        said.append(f"# It writes the day, here {day}: change it in the text below.")
    return [*said, f'TEMPLATE """{text}"""']


def _can_be_quoted(text: str) -> bool:
    """Whether Ollama reads a quoted text as it is: it drops what cannot be printed."""
    printed = all(one.isprintable() for one in text if one not in "\t\r\n")
    return printed and '"""' not in text and not text.endswith('"')


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _place(name: str) -> str:
    """A file beside the Modelfile; a name of Ollama's (`llama3.2`) or a path as it is."""
    return f"./{name}" if name.endswith(".gguf") and "/" not in name else name
