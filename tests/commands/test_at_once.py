"""What paths, JSON, headers and counts show is refused in two seconds, before torch is imported.

What needs the architecture is refused before weights are read, in ten seconds with the imports. On
some machines importing torch and transformers takes ten by itself, so these are measured, and four
seconds beyond them are allowed: less than ten in all where they take less than six. Each case is a
process of its own, as a user starts it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import edit_weights, save_tokenizer, tree_hash
from processor import processor_s

LIMIT_S, BEYOND_IMPORTS_S = 2.0, 4.0
IMPORTS = "import torch, transformers.modeling_utils"
ANY_COMMAND = """
import sys
from qlora_kit.commands.main import main
sys.exit(main(sys.argv[1:]))
"""
COMMAND = """
import sys
from qlora_kit.commands.main import main
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
    (folder / "used" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    shutil.copy(workshop.rows, folder / "rows.jsonl")
    (folder / "bad.jsonl").write_text('\n{"prompt": "a"\n')
    (folder / "empty.jsonl").write_text("\n\n")
    return folder


def cut(path: Path) -> None:
    # JSON ends in a brace and a line end, without which it is whole.
    path.write_bytes(path.read_bytes()[:-2])


def refused(
    home: Path, command: str, code: int, *words: str, how: str = COMMAND, limit_s: float = LIMIT_S
) -> None:
    """The command ends with that code and those words, in time, with nothing changed."""
    before, used = tree_hash(home), processor_s()
    done = subprocess.run(
        [sys.executable, "-c", how, *command.split()],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    took = processor_s() - used
    assert done.returncode == code, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert took < limit_s
    assert tree_hash(home) == before


@pytest.fixture(scope="module")
def imports_s() -> float:
    """Seconds of the processor for importing what a command needs, at the second time."""
    for _ in range(2):
        used = processor_s()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        took = processor_s() - used
    return took


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


PLACES = {
    "used": (2, "--output_dir used is not empty; choose another place, or give --overwrite"),
    "used --resume_from_checkpoint auto": (2, "--output_dir used is not empty"),
    "base/inside": (2, "--output_dir base/inside overlaps with"),
    "base --overwrite": (2, "--output_dir base overlaps with"),
    ". --overwrite": (2, "--output_dir . overlaps with"),
    "adapter --overwrite --adapter adapter": (2, "--output_dir adapter overlaps with"),
    "rows.jsonl --overwrite": (2, "--output_dir rows.jsonl overlaps with"),
    "bad.jsonl": (2, "--output_dir bad.jsonl is a file; choose a directory"),
    "bad.jsonl/inside": (4, "bad.jsonl is a file; choose another place"),
    "stopped": (2, "--output_dir stopped holds a run that was interrupted; go on with"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_into_a_place_that_is_taken(home: Path, place: str) -> None:
    (home / "stopped" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    (home / "stopped" / "checkpoint-3" / "manifest.json").write_text("{}")
    code, said = PLACES[place]
    refused(home, f"finetune --model ./base --data rows.jsonl --output_dir {place}", code, said)


@pytest.mark.parametrize("place", ["used", "adapter", "base/inside"])
def test_an_export_into_a_place_that_is_taken(home: Path, place: str) -> None:
    said = "is not empty" if place == "used" else "overlaps with"
    refused(home, f"export --adapter adapter --model ./base --output_dir {place}", 2, said)


TRAIN = "finetune --data rows.jsonl --output_dir out --model"
SHAPES = {
    f"{TRAIN} ./shape": (3, "q_proj.weight is [63, 64], expected [64, 64]"),
    f"{TRAIN} ./lacking": (3, "lacks model.norm.weight"),
    f"{TRAIN} ./tokens": (3, "tokens, 264 embedding rows"),
    f"{TRAIN} ./nan --target_modules nope_proj": (2, "matches no linear of this model"),
    f"{TRAIN} ./nan --lora_r 5000": (2, "lora_r 5000 is above the largest dimension"),
    f"{TRAIN} ./nan --max_length 4000": (2, "max_length 4000 is above the model's context"),
    "generate --prompt x --adapter ./adapter --model ./nan": (3, "with other weights than nan"),
    "evaluate --data rows.jsonl --model ./shape": (3, "is [63, 64], expected [64, 64]"),
    "export --output_dir out --adapter adapter --model ./lacking": (3, "lacks model.norm.weight"),
}


@pytest.fixture(scope="module")
def shapes(home: Path) -> Path:
    """Bases whose files are whole, and do not fit their architecture; `nan` must not be read."""
    key = "model.layers.0.self_attn.q_proj.weight"
    for name, change in {
        "shape": lambda tensors: tensors.update({key: tensors[key][:63].clone()}),
        "lacking": lambda tensors: tensors.pop("model.norm.weight"),
        "nan": lambda tensors: tensors["lm_head.weight"].fill_(float("nan")),
        "tokens": lambda tensors: None,
    }.items():
        shutil.copytree(home / "base", home / name)
        edit_weights(home / name, change)
    save_tokenizer(home / "tokens", extra=100)
    return home


@pytest.mark.parametrize("command", SHAPES)
def test_what_the_architecture_shows(shapes: Path, imports_s: float, command: str) -> None:
    code, words = SHAPES[command]
    limit_s = imports_s + BEYOND_IMPORTS_S
    refused(shapes, command, code, words, how=ANY_COMMAND, limit_s=limit_s)
