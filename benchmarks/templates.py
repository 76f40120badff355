"""Chats of every kind over the chat templates of real families: ids and labels against references.

Ids must be those of transformers' `apply_chat_template(tokenize=True)`, of the whole chat or, where
a template writes earlier turns otherwise, of the chat up to each trained turn. Labels are judged by
a masker written apart: what stands between a family's own header and its end token, found in the
rendered text by a regular expression. Of any template it must hold that a trained turn begins where
the template's own generation prompt ends, has the answer in it, and ends with a token at which
generation stops. The table has family x chats x equal, and every difference.

The families' templates are not part of the project. They lie in public packages: the source
distribution of llama-cpp-python (models/templates/*.jinja) and trl.

    python benchmarks/templates.py --templates DIR --tokenizer DIR   # of vocab and merges; 2 min
"""

from __future__ import annotations

import collections
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from record import make_parser, write_result  # noqa: E402
from templates_parts.chats import CHATS, said  # noqa: E402
from templates_parts.families import FAMILIES, tokenizer_of  # noqa: E402
from templates_parts.judge import judged  # noqa: E402

from qlora_kit.data.answers import chat_ids  # noqa: E402
from qlora_kit.errors import QloraKitError  # noqa: E402


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
