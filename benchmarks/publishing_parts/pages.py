"""Where a page may not go, and what `--overwrite` does not replace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from publishing_parts.shop import Shop, case, refused, run, works
from qlora_kit.files.lock import locked

MARK = '{"merge_base": "original", "dtype": "bf16"}'


def _html(name: str, prepare: Callable[[Shop, Path], tuple[Path, Path]], words: str) -> None:
    @case("html", name)
    def tried(shop: Shop, folder: Path) -> tuple[bool, str]:
        page, data = prepare(shop, folder)
        return refused(shop.page(page, data), folder, 2, words)


def _copied(shop: Shop, folder: Path, name: str = "rows.jsonl") -> Path:
    return Path(shutil.copy(shop.root / "rows.jsonl", folder / name))


def _made(path: Path, text: str = "<p>mine</p>") -> Path:
    path.write_text(text)
    return path


def _linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _hard(path: Path, target: Path) -> Path:
    path.hardlink_to(target)
    return path


def page_cases() -> None:
    no_page, irregular = "is no page of show-data", "is not a regular file"
    rows = _copied
    _html("over its data", lambda s, f: (rows(s, f), f / "rows.jsonl"), no_page)
    _html("over a link to its data", lambda s, f: (_linked(f / "a", rows(s, f)), f / "a"), no_page)
    _html("over a hard link", lambda s, f: (_hard(f / "a", rows(s, f)), f / "rows.jsonl"), no_page)
    _html("over somebody's page", lambda s, f: (_made(f / "a.html"), rows(s, f)), no_page)
    _html("over an empty file", lambda s, f: (_made(f / "a.html", ""), rows(s, f)), no_page)
    _html("over a link to nothing", lambda s, f: (_linked(f / "a", f / "b"), rows(s, f)), irregular)
    _html("over a directory", lambda s, f: (f, rows(s, f)), "is a directory")

    @case("html", "over its own page")
    def again(shop: Shop, folder: Path) -> tuple[bool, str]:
        data = _copied(shop, folder)
        codes = [run(shop.page(folder / "page.html", data)) for _ in range(2)]
        good = [code for code, _ in codes] == [0, 0]
        return good and sorted(os.listdir(folder)) == ["page.html", "rows.jsonl"], str(codes)


def _kept(name: str, prepare: Callable[[Shop, Path], Path], words: str, **how: Any) -> None:
    @case("--overwrite", name)
    def tried(shop: Shop, folder: Path) -> tuple[bool, str]:
        place = prepare(shop, folder)
        told = {key: value(place) for key, value in how.items()}
        return refused(shop.export(place, "--overwrite"), folder, 2, words, **told)


def _with(folder: Path, *names: str) -> Path:
    place = folder / "out"
    for name in ("export.json", *names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(MARK if name == "export.json" else "")
    return place


def overwrite_cases() -> None:
    stranger = "which no run and no export made"
    _kept("a file of one's own beside an export", lambda s, f: _with(f, "notes.txt"), stranger)
    _kept("a folder of one's own", lambda s, f: _with(f, "mine/precious"), stranger)
    _kept("a git checkout", lambda s, f: _with(f, ".git/HEAD"), "is a git checkout")
    _kept("a home", lambda s, f: _with(f), "the home directory", home=str)
    _kept("a working directory", lambda s, f: _with(f), "the working directory", folder=Path)
    _kept(
        "above the working directory",
        lambda s, f: _with(f, "checkpoint-1/x"),
        "the working directory",
        folder=lambda place: place / "checkpoint-1",
    )
    _kept("the base", lambda s, f: s.root / "base", "overlaps with")
    _kept("above the base", lambda s, f: s.root, "overlaps with")
    _kept("in the adapter", lambda s, f: s.root / "adapter" / "out", "overlaps with")

    @case("--overwrite", "another model")
    def model(shop: Shop, folder: Path) -> tuple[bool, str]:
        shutil.copytree(shop.root / "base", folder / "out")
        arguments = shop.export(folder / "out", "--overwrite")
        return refused(arguments, folder, 2, "holds neither a run nor an export")

    @case("--overwrite", "a directory in which a run trains")
    def trains(shop: Shop, folder: Path) -> tuple[bool, str]:
        place = _with(folder)
        with locked(place):
            return refused(shop.export(place, "--overwrite"), folder, 4, "in use by process")

    @case("--overwrite", "an earlier export")
    def earlier(shop: Shop, folder: Path) -> tuple[bool, str]:
        first, line = works(shop.export(folder / "out", dtype="fp32"), folder / "out")
        if not first:
            return first, line
        (folder / "out" / "model-00001-of-00002.safetensors").write_text("stale")
        good, line = works(shop.export(folder / "out", "--overwrite"), folder / "out")
        return good and not (folder / "out" / "model-00001-of-00002.safetensors").exists(), line
