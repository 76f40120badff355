"""What becomes of spaces beside control tokens, which some tokenizers take away.

No key of a GGUF says it. llama.cpp takes those behind control tokens away where the model's name
has "phi-3" or "phi3" in it, as Phi-3's tokenizer does, and nowhere else. So the name that a file
gets is chosen for it: it has that in it where the tokenizer is such a one, and not where it is not,
for then llama.cpp would also look for tokens that may not be there, and end.

Source: llama.cpp's src/llama-vocab.cpp, "set attributes by model/tokenizer/architecture name".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qlora_kit.gguf.differences import Difference

LEFT = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens beside which llama.cpp leaves the spaces in a model of that name."""
NEEDED = (*LEFT, "</s>")
NAME = re.compile("phi-?3", re.IGNORECASE)
Added = Sequence[Mapping[str, Any]]


def strips_as_phi3(added: Added, tokens: Collection[str]) -> bool:
    """Whether the tokenizer takes spaces away as llama.cpp does for a model of that name."""
    stripping = {one["content"]: one["rstrip"] for one in added}
    return (
        any(stripping.values())
        and set(NEEDED) <= set(tokens)
        and not any(one["lstrip"] for one in added)
        and all(strips == (text not in LEFT) for text, strips in stripping.items())
    )


def general_name(name: str, strips: bool) -> str:
    """A model's name, for `general.name`, with which llama.cpp does what the tokenizer does."""
    if strips == (NAME.search(name) is not None):
        return name
    return f"{name} phi-3" if strips else NAME.sub("phi 3", name)


def stripped(added: Added) -> list[Difference]:
    """What a tokenizer that takes spaces away does otherwise than llama.cpp, which leaves them."""
    found = []
    for where, key in (("behind", "rstrip"), ("before", "lstrip")):
        texts = [one["content"] for one in added if one[key]]
        pattern = "|".join(map(re.escape, texts))
        concerned = rf"(?:{pattern})\s" if where == "behind" else rf"\s(?:{pattern})"
        if texts:
            said = f"spaces {where} tokens such as {texts[0]}, which the tokenizer drops"
            found.append(Difference(said, re.compile(concerned).search))
    return found
