"""What paths, JSON, headers and counts show is refused in two seconds, before torch is imported.

What needs the architecture is refused before weights are read, in four seconds beyond the imports.
The seconds are the processor's. Each case is a process of its own. The first of each command is
forked from one that has imported nothing; the others from one that has imported what such a command
imports, for the light modules are the same ones each time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import edit_weights, save_tokenizer, tree_hash
from forked import Forks

Refused = Callable[..., None]
LIMIT_S, BEYOND_IMPORTS_S = 2.0, 4.0
IMPORTS = """
import contextlib, io
from qlora_kit.commands.main import main
os.chdir({folder!r})
with contextlib.redirect_stderr(io.StringIO()):
    main({arguments!r})
"""
NOTHING_HEAVY = """
heavy = {"torch", "transformers", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
"""
ADAPTER = {
    "finetune": "finetune --data rows.jsonl --output_dir out",
    "export": "export --output_dir out",
    "generate": "generate --prompt x",
    "chat": "chat",
    "evaluate": "evaluate --data rows.jsonl",
}
BASE = {
    "finetune": "finetune --data rows.jsonl --output_dir out",
    "export": "export --adapter adapter --output_dir out",
    "generate": "generate --prompt x",
    "chat": "chat",
    "evaluate": "evaluate --data rows.jsonl",
}
DATA = {
    "finetune": "finetune --model ./base --output_dir out --data",
    "export": "export --adapter adapter --model ./base --output_dir out --verify",
    "evaluate": "evaluate --model ./base --data",
    "show-data": "show-data --model ./base --data",
}
FIRST = {command: f"{asked} --model" for command, asked in BASE.items()} | {
    "show-data": "show-data --data rows.jsonl --model"
}
"""The first refusal of each command: what it imports for it is what the others import."""


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


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("cold"), after=NOTHING_HEAVY)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Forks]:
    first = (f"{asked} ./nowhere".split() for asked in FIRST.values())
    before = "".join(IMPORTS.format(folder=str(home), arguments=one) for one in first)
    forks = Forks(tmp_path_factory.mktemp("light"), before, NOTHING_HEAVY)
    yield forks
    forks.close()


@pytest.fixture
def refused(light: Forks, home: Path) -> Callable[..., None]:
    """Run a command that must be refused before anything heavy is imported."""
    return functools.partial(check_refused, light, LIMIT_S, home)


@pytest.mark.parametrize("command", FIRST)
def test_a_command_that_imports_all_that_it_needs(cold: Forks, home: Path, command: str) -> None:
    asked = f"{FIRST[command]} ./nowhere"
    check_refused(cold, LIMIT_S, home, asked, 3, "nowhere: no such directory")


def check_refused(
    forks: Forks, limit_s: float, home: Path, command: str, code: int, *words: str
) -> None:
    """The command ends with that code and those words, in time, with nothing changed."""
    before = tree_hash(home)
    done = forks.run(home, *command.split())
    assert done.code == code, done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert done.seconds < limit_s
    assert tree_hash(home) == before


@pytest.mark.parametrize("command", ADAPTER)
def test_an_adapter_that_is_missing_or_cut(refused: Refused, command: str) -> None:
    asked = f"{ADAPTER[command]} --adapter"
    refused(f"{asked} ./nowhere", 3, "nowhere: no such directory")
    refused(f"{asked} ./cut_json_adapter", 3, "adapter_config.json:", "not JSON")
    refused(f"{asked} ./cut_weights_adapter", 3, "corrupt safetensors")


@pytest.mark.parametrize("command", BASE)
def test_a_base_that_is_missing_or_cut(refused: Refused, command: str) -> None:
    asked = f"{BASE[command]} --model"
    refused(f"{asked} ./nowhere", 3, "nowhere: no such directory")
    refused(f"{asked} ./cut_json_base", 3, "config.json:", "not JSON")
    refused(f"{asked} ./cut_weights_base", 3, "corrupt safetensors")


@pytest.mark.parametrize("command", DATA)
def test_rows_that_are_missing_or_bad(refused: Refused, command: str) -> None:
    refused(f"{DATA[command]} ./nowhere.jsonl", 3, "nowhere.jsonl: no such file")
    refused(f"{DATA[command]} ./bad.jsonl", 3, "bad.jsonl:2")
    refused(f"{DATA[command]} ./empty.jsonl", 3, "empty.jsonl")


def test_a_base_without_a_tokenizer_file_to_show_data_with(refused: Refused) -> None:
    show = "show-data --data rows.jsonl --model"
    refused(f"{show} ./nowhere", 3, "nowhere: no such directory")
    refused(f"{show} ./used", 3, "holds no tokenizer")


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
def test_a_run_into_a_place_that_is_taken(refused: Refused, home: Path, place: str) -> None:
    (home / "stopped" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    (home / "stopped" / "checkpoint-3" / "manifest.json").write_text("{}")
    code, said = PLACES[place]
    refused(f"finetune --model ./base --data rows.jsonl --output_dir {place}", code, said)


@pytest.mark.parametrize("place", ["used", "adapter", "base/inside"])
def test_an_export_into_a_place_that_is_taken(refused: Refused, place: str) -> None:
    said = "is not empty" if place == "used" else "overlaps with"
    refused(f"export --adapter adapter --model ./base --output_dir {place}", 2, said)


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


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Iterator[Forks]:
    before = IMPORTS.format(folder=str(shapes), arguments=next(iter(SHAPES)).split())
    forks = Forks(tmp_path_factory.mktemp("heavy"), before)
    yield forks
    forks.close()


@pytest.mark.parametrize("command", SHAPES)
def test_what_the_architecture_shows(shapes: Path, heavy: Forks, command: str) -> None:
    code, words = SHAPES[command]
    check_refused(heavy, BEYOND_IMPORTS_S, shapes, command, code, words)
