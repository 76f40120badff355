"""Whether a reader of an export makes the same tokens of texts, and ends answers at the same ones.

A tokenizer that is a little wrong makes a model that is a little worse, everywhere and silently; so
a single difference is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qlora_kit.data.tokens import Encoded
from qlora_kit.errors import ExportError
from qlora_kit.generation.decode import end_ids

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two blanks before,   three between, and two behind  ",
    "Straße, naïve café: Ångström's œuvre — “quoted”…",
    "Привет, мир! 你好,世界。こんにちは世界 안녕하세요 שלום مرحبا नमस्ते",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\u00a0\ufeff ﬁ ½ ①",
    "def f(x: int) -> str:\n    return f'{x!r}'\n\n\n\tif (a && b) { c[i] += 0x1F; } // TODO",
    '{"id": 12345, "pi": 3.14159, "list": [1, 22, 333, 4444, 1000000]}',
    "line\nline\n\nline\r\n\ttab\t\ttabs\n   \n",
    "I'm you're WE'VE they'll CamelCaseWord snake_case_word http://a.b/c?d=e&f=%20",
    "<s>[INST] <|im_start|>user\nhi<|im_end|> <|eot_id|></s> <end_of_turn> <think>",
)
"""Spaces, accents, scripts, emoji, code, numbers, ends of lines, control strings."""
FROM_ROWS, CHARACTERS = 5, 1000
"""How many of the compared rows are taken as texts too, and how much of each."""
REMEDY = "nothing was written; report this with the command and the model"
OF_THE_WHOLE = (
    "nothing was written; transformers takes another tokenizer for the text model alone: "
    "--format hf --with_towers writes the whole"
)


def texts_of(rows: Sequence[Encoded], tokenizer: Any) -> list[str]:
    """The texts to compare on: the fixed ones, and the beginnings of some rows."""
    return [
        *TEXTS,
        *(tokenizer.decode(row.input_ids)[:CHARACTERS] for row in rows[:FROM_ROWS]),
    ]


def check_tokens(
    reader: str,
    ours: Any,
    theirs: Callable[[str], Sequence[int]],
    texts: Sequence[str],
    remedy: str = REMEDY,
) -> None:
    """Refuse a reader whose tokens of a text are others than our tokenizer's.

    Errors: `ExportError` with the text and where they first differ.
    """
    for text in texts:
        expected, found = list(ours(text)["input_ids"]), list(theirs(text))
        if found == expected:
            continue
        pairs = enumerate(zip(expected, found, strict=False))
        at = next((n for n, (one, other) in pairs if one != other), min(len(expected), len(found)))
        raise ExportError(
            f"{reader} makes other tokens of a text: of {_around(text, ours, expected, at)} it "
            f"makes {found[at : at + 3]} where training had {expected[at : at + 3]}",
            remedy,
        )


def check_vocabulary(
    reader: str, ours: Sequence[str | None], theirs: Sequence[str | None], remedy: str = REMEDY
) -> None:
    """Refuse a reader that has another token under an id, None for one that has no name.

    Errors: `ExportError` with the first one.
    """
    if len(theirs) < len(ours):
        raise ExportError(f"{reader} has {len(theirs)} tokens, training {len(ours)}", remedy)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one is not None and one != other:
            raise ExportError(
                f"token {number} is {other!r} to {reader} and {one!r} in training", remedy
            )


def vocabulary(tokenizer: Any) -> list[str | None]:
    """The name of every id of a tokenizer, None for gaps."""
    named = tokenizer.get_vocab()
    names: list[str | None] = [None] * (1 + max(named.values(), default=-1))
    for name, number in named.items():
        names[number] = name
    return names


def check_ends(reader: str, model: Any, tokenizer: Any, theirs: Iterable[int]) -> None:
    """Refuse a reader that goes on after a token at which an answer ends here.

    Errors: `ExportError`.
    """
    missing = sorted(end_ids(model, tokenizer) - set(theirs))
    if missing:
        names = ", ".join(str(tokenizer.convert_ids_to_tokens(one)) for one in missing)
        raise ExportError(f"{reader} does not end an answer at {names}", REMEDY)


def _around(text: str, tokenizer: Any, ids: Sequence[int], at: int) -> str:
    """Some characters of a text around its token number `at`."""
    before = len(tokenizer.decode(ids[:at], skip_special_tokens=True))
    piece = text[max(0, before - 10) : before + 30]
    return repr(piece)
