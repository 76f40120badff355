"""What comes to the place while an export is written, and token caches that cannot be used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from publishing_parts.shop import LIBC, NOBODY, READ_ONLY, REMOUNT, Shop, case, mounted, run, tree


def meanwhile_cases() -> None:
    def comes(name: str, before: bool) -> None:
        @case("meanwhile", f"{name} comes, {'over an export' if before else 'where nothing was'}")
        def tried(shop: Shop, folder: Path) -> tuple[bool, str]:
            place = folder / "out"
            old: dict[str, str] = {}
            if before:
                run(shop.export(place, dtype="fp32"))
                old = tree(folder)

            def come() -> None:
                if name == "a file":
                    place.mkdir(exist_ok=True)
                    (place / "precious").write_text("precious")
                elif name == "a changed file":
                    (place / "config.json").write_text("precious")
                else:
                    place.write_text("precious")

            code, line = run(shop.export(place, "--overwrite"), meanwhile=come)
            now = tree(folder)
            key = {"a file": "out/precious", "a changed file": "out/config.json"}.get(name, "out")
            hash_ = hashlib.sha256(b"precious").hexdigest()
            kept = now == {**old, key: hash_}
            return code == 4 and "came there while" in line and kept, f"exit {code}: {line}"

    comes("a file", True)
    comes("a changed file", True)
    comes("a file", False)
    comes("a file of its name", False)

    @case("meanwhile", "two exports to one new place")
    def two(shop: Shop, folder: Path) -> tuple[bool, str]:
        place, second = folder / "out", list[tuple[int, str]]()

        def other() -> None:
            if not place.exists():
                os.fork = os.fork
                second.append(run(shop.export(place, dtype="fp32")))

        code, line = run(shop.export(place), meanwhile=other)
        report = json.loads((place / "export.json").read_text())
        good = code == 4 and "came there while" in line and report["dtype"] == "fp32"
        return good and os.listdir(folder) == ["out"], f"exit {code}: {line}"


def cache_cases() -> None:
    def cached(name: str, mounts: bool, prepare: Callable[[Path], Path], **how: Any) -> None:
        @case("token cache", name, mounts)
        def tried(shop: Shop, folder: Path) -> tuple[bool, str]:
            with contextlib.ExitStack() as held:
                cache = held.enter_context(prepare(folder))  # type: ignore[arg-type]
                known = ("--model", shop.root / "base", "--data", shop.root / "rows.jsonl")
                flags = [] if cache is None else ["--token_cache", cache]
                code, line = run([str(one) for one in ("show-data", *known, *flags)], **how)
            return code == 0, f"exit {code}: {line}"

    @contextlib.contextmanager
    def full(folder: Path) -> Iterator[Path]:
        with mounted(folder / "c", options=b"size=4k") as place:
            yield place / "x"

    @contextlib.contextmanager
    def read_only(folder: Path) -> Iterator[Path]:
        with mounted(folder / "c") as place:
            LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", REMOUNT | READ_ONLY, None)
            yield place

    @contextlib.contextmanager
    def others(folder: Path) -> Iterator[Path]:
        (folder / "c").mkdir(mode=0o755)
        yield folder / "c"

    @contextlib.contextmanager
    def unreadable(folder: Path) -> Iterator[Path]:
        (folder / "c").mkdir(mode=0o700)
        yield folder / "c"

    @contextlib.contextmanager
    def none(folder: Path) -> Iterator[None]:
        yield None

    cached("full", True, full)
    cached("on a read-only disk", True, read_only)
    cached("another user's", False, others, user=NOBODY)
    cached("unreadable", False, unreadable, user=NOBODY)
    cached("no HOME, and a user without a name", False, none, user=54321, home=None)
