"""The server under trial: by the `openai` client, by many at once, by thousands, by hostile ones.

The real command serves the tiny base in 4 bits with eight adapters of different rank, in a process
of its own on loopback. What it answers greedily is compared with what `generate` answers with each
adapter alone, one prompt at a time, in fp32. Parts: `client`, the openai package; `together`,
sixteen clients that name eight adapters, against one at a time; `leak`, memory and descriptors
over thousands of requests of every kind; `hostile`, requests that have to be refused, a server that
answers as before, and how long others wait meanwhile; `leaving`, clients that hang up at every
moment. Less than ten minutes on two cores.

    python benchmarks/serving.py
    python benchmarks/serving.py --part together
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from record import make_parser, write_result  # noqa: E402
from serving_parts import (  # noqa: E402
    hostile,
    judging,
    leak,
    leaving,
    real_client,
    strangers,
    together,
)
from serving_parts.adapters import RANKS, answers_of_generate, make_adapters, prompts  # noqa: E402
from serving_parts.server import Server  # noqa: E402

BASE = "tiny"
PROMPTS = 4


@dataclass(frozen=True)
class Setting:
    """What all parts are given."""

    folder: Path
    adapters: dict[str, Path]
    asked: list[str]
    expected: dict[tuple[str, str], list[str]]
    """what `generate` answers, by form (chat or text) and model"""

    @property
    def models(self) -> list[str]:
        """Names of all models; the base is first."""
        return [BASE, *self.adapters]

    def text(self, model: str) -> list[str]:
        """Answers of a model to the plain prompts."""
        return self.expected["text", model]


def prepare(folder: Path) -> Setting:
    """Adapters, and what each of them answers alone; as they are where the folder has them."""
    kept, asked = folder / "answers.json", prompts(PROMPTS)
    if not kept.exists():
        folder.mkdir(exist_ok=True)
        made = [
            (form, name, answers_of_generate(path, asked, folder, chat=form == "chat"))
            for name, path in {BASE: None, **make_adapters(folder)}.items()
            for form in ("chat", "text")
        ]
        kept.write_text(json.dumps(made))
    expected = {(form, name): texts for form, name, texts in json.loads(kept.read_text())}
    adapters = {name: folder / name for _, name in expected if name != BASE}
    return Setting(folder, adapters, asked, expected)


def client(setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    with Server(setting.folder, setting.adapters) as server:
        held = real_client.try_client(server.port, setting.models, setting.asked, setting.expected)
    return {"tried": len(held), "failed": [name for name, good in held.items() if not good]}


def at_once(setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    names = list(setting.adapters)
    expected = {name: setting.text(name) for name in names}
    with Server(setting.folder, setting.adapters, "--max_batch", "16") as server:
        found = together.compare(server.port, names, setting.asked, expected)
    return {**found, "different_texts": len({text for one in expected.values() for text in one})}


def watched(setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    with Server(setting.folder, setting.adapters) as server:
        adapter = setting.adapters["task7"]
        return leak.watch(server, setting.models, setting.asked, given.requests, adapter)


def hostile_ones(setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    some = {name: setting.text(name)[0] for name in (BASE, "task3")}
    found = {}
    for name, key, kinds in (
        ("with_key", True, (*hostile.KEYED, strangers.wrong_keys)),
        ("keyless", False, (strangers.of_others,)),
    ):
        cases = [case for kind in kinds for case in kind()]
        if key:
            cases += hostile.adapter_names(str(setting.adapters["task0"]))
        with Server(setting.folder, setting.adapters, key=key) as server:
            found[name] = judging.judge(
                server,
                cases,
                lambda server=server: judging.well(server, some, setting.asked[0], setting.models),
            )
            found[name]["exit_code"] = server.stop()
    return found


def hung_up(setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    with Server(setting.folder, setting.adapters, "--max_batch", "4") as server:
        return leaving.hang_up(server, setting.models, setting.asked[0])


PARTS: dict[str, Callable[[Setting, argparse.Namespace], dict[str, Any]]] = {
    "client": client,
    "together": at_once,
    "leak": watched,
    "hostile": hostile_ones,
    "leaving": hung_up,
}


def main() -> None:
    parser = make_parser(__doc__, "serving")
    parser.add_argument("--part", choices=PARTS, help="this part alone; writes no result")
    parser.add_argument("--requests", type=int, default=2000, help="of the part leak (%(default)s)")
    parser.add_argument("--made", type=Path, help="folder of adapters and answers, used again")
    given = parser.parse_args()
    began = time.perf_counter()
    result: dict[str, Any] = {"base": BASE, "ranks": RANKS}
    with tempfile.TemporaryDirectory() as name:
        setting = prepare((given.made or Path(name)).resolve())
        for part, measure in PARTS.items():
            if given.part in (None, part):
                result[part] = measure(setting, given)
                print(part, json.dumps(result[part], indent=1), flush=True)
    result["seconds"] = round(time.perf_counter() - began, 1)
    if not given.part:
        print(write_result(given, result))


if __name__ == "__main__":
    main()
