"""How a client is asked and answers: a JSON file in, JSON files out, nothing of qlora_kit between.

A process is given some tasks, so that it imports what it needs once. A task has `rows`, each with a
prompt's `text`, its `ids`, the ids of a `continuation` and a `completion` in words; `new_tokens` to
draw greedily; `context`; and the places of files: `model`, `base`, `adapter`, `lora`. The answer
has for each row the `tokens` that the client makes of the text, the greedy `ids` and `text`, and,
packed, the log-probability of every token of the vocabulary at each position of the continuation
(or in `given` their sum over the completion, where a client says no more). Python's own library
alone, for it runs in the client's environment.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Task = dict[str, Any]
NEVER = -1e9
"""The log-probability of a token that a client does not name."""


def serve(answer: Callable[[Task], dict[str, Any]], *packages: str, ours: bool = False) -> None:
    """Answer the tasks in the file that is named first, one by one, into those that they name.

    What a client raises is its refusal. `packages` are those whose version is told.
    """
    if not ours and importlib.util.find_spec("qlora_kit") is not None:
        raise SystemExit("qlora_kit can be imported here")
    for task in json.loads(Path(sys.argv[1]).read_text()):
        try:
            said = answer(task)
        except Exception as error:
            words = " ".join(str(error).split())
            said = {"refused": f"{type(error).__name__}: {words[:300]}"}
        said["versions"] = {name: importlib.metadata.version(name) for name in packages}
        Path(task["answer"]).write_text(json.dumps(said))


def packed(rows: Iterable[Sequence[float]]) -> str:
    """Log-probabilities, (positions, vocabulary), as text."""
    flat = array("f")
    for row in rows:
        flat.extend(row)
    return base64.b64encode(flat.tobytes()).decode()


def unpacked(text: str, positions: int) -> list[array[float]]:
    """What `packed` was given."""
    flat = array("f", base64.b64decode(text))
    width = len(flat) // positions
    return [flat[at * width : (at + 1) * width] for at in range(positions)]


def in_order(named: Mapping[int, float], vocabulary: int) -> list[float]:
    """Log-probabilities by token as a list; what is not named is `NEVER`."""
    row = [NEVER] * vocabulary
    for token, value in named.items():
        if 0 <= token < vocabulary:
            row[token] = value if math.isfinite(value) else NEVER
    return row
