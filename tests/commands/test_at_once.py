"""What paths, JSON, headers and counts show is refused in two seconds, before torch is imported.

Each case is a process of its own, as a user starts it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import tree_hash

LIMIT_S = 2.0
COMMAND = """
import sys
from qlora_kit.commands.entry import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""
ADAPTER = {
    "finetune": "finetune --data rows.jsonl --output_dir out",
    "export": "export --output_dir out",
    "generate": "generate --prompt x",
    "evaluate": "evaluate --data rows.jsonl",
}
BASE = {
    "finetune": "finetune --data rows.jsonl --output_dir out",
    "export": "export --adapter adapter --output_dir out",
    "generate": "generate --prompt x",
    "evaluate": "evaluate --data rows.jsonl",
}
DATA = {
    "finetune": "finetune --model ./base --output_dir out --data",
    "export": "export --adapter adapter --model ./base --output_dir out --verify",
    "evaluate": "evaluate --model ./base --data",
    "show-data": "show-data --model ./base --data",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, workshop: Any) -> Path:
    """A base, an adapter and rows, each also spoilt in a way that no tensor is needed to see."""
    folder = tmp_path_factory.mktemp("home")
    for name, source in (("base", workshop.base), ("adapter", workshop.adapter)):
        shutil.copytree(source, folder / name)
        for spoilt in ("cut_json", "cut_weights"):
            shutil.copytree(source, folder / f"{spoilt}_{name}")
    for file in ("cut_json_base/config.json", "cut_json_adapter/adapter_config.json"):
        cut(folder / file)
    for file in ("cut_weights_base/model", "cut_weights_adapter/adapter_model"):
        cut(folder / f"{file}.safetensors")
    (folder / "used").mkdir()
    (folder / "used" / "mine").write_text("mine")
    shutil.copy(workshop.rows, folder / "rows.jsonl")
    (folder / "bad.jsonl").write_text('\n{"prompt": "a"\n')
    (folder / "empty.jsonl").write_text("\n\n")
    return folder


def cut(path: Path) -> None:
    # JSON ends in a brace and a line end, without which it is whole.
    path.write_bytes(path.read_bytes()[:-2])


def refused(home: Path, command: str, code: int, *words: str) -> None:
    """The command ends with that code and those words, in time, with nothing changed."""
    before = tree_hash(home)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *command.split()],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - began
    assert done.returncode == code, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert took < LIMIT_S
    assert tree_hash(home) == before


@pytest.mark.parametrize("command", ADAPTER)
def test_an_adapter_that_is_missing_or_cut(home: Path, command: str) -> None:
    asked = f"{ADAPTER[command]} --adapter"
    refused(home, f"{asked} ./nowhere", 3, "nowhere: no such directory")
    refused(home, f"{asked} ./cut_json_adapter", 3, "adapter_config.json:", "not JSON")
    refused(home, f"{asked} ./cut_weights_adapter", 3, "corrupt safetensors")


@pytest.mark.parametrize("command", BASE)
def test_a_base_that_is_missing_or_cut(home: Path, command: str) -> None:
    asked = f"{BASE[command]} --model"
    refused(home, f"{asked} ./nowhere", 3, "nowhere: no such directory")
    refused(home, f"{asked} ./cut_json_base", 3, "config.json:", "not JSON")
    refused(home, f"{asked} ./cut_weights_base", 3, "corrupt safetensors")


@pytest.mark.parametrize("command", DATA)
def test_rows_that_are_missing_or_bad(home: Path, command: str) -> None:
    refused(home, f"{DATA[command]} ./nowhere.jsonl", 3, "nowhere.jsonl: no such file")
    refused(home, f"{DATA[command]} ./bad.jsonl", 3, "bad.jsonl:2")
    refused(home, f"{DATA[command]} ./empty.jsonl", 3, "empty.jsonl")


def test_a_base_without_a_tokenizer_file_to_show_data_with(home: Path) -> None:
    show = "show-data --data rows.jsonl --model"
    refused(home, f"{show} ./nowhere", 3, "nowhere: no such directory")
    refused(home, f"{show} ./used", 3, "holds no tokenizer")


@pytest.mark.parametrize("place", ["used", "adapter", "base/inside"])
def test_an_export_into_a_place_that_is_taken(home: Path, place: str) -> None:
    said = "is not empty" if place == "used" else "overlaps with"
    refused(home, f"export --adapter adapter --model ./base --output_dir {place}", 2, said)
