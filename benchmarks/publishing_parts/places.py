"""Where an export may go: new places, other users' ones, volumes."""

from __future__ import annotations

import os
from pathlib import Path

from publishing_parts.shop import (
    BIND,
    DETACH,
    LIBC,
    NOBODY,
    READ_ONLY,
    REMOUNT,
    Shop,
    case,
    mounted,
    refused,
    works,
)


def place_cases() -> None:
    @case("places", "a new directory, and its parents")
    def new(shop: Shop, folder: Path) -> tuple[bool, str]:
        (folder / "a").mkdir()
        return works(shop.export(folder / "a" / "out"), folder / "a" / "out")

    @case("places", "the empty working directory, as .")
    def here(shop: Shop, folder: Path) -> tuple[bool, str]:
        (folder / "out").mkdir()
        before = os.stat(folder / "out").st_ino
        good, line = works(shop.export("."), folder / "out", folder=folder / "out")
        return good and os.stat(folder / "out").st_ino == before, line

    def owned(folder: Path, mode: int) -> Path:
        place = folder / "parent" / "out"
        place.mkdir(parents=True)
        os.chown(place, NOBODY, NOBODY)
        os.chmod(place.parent, mode)
        return place

    @case("places", "one's own in a parent that is not")
    def own(shop: Shop, folder: Path) -> tuple[bool, str]:
        place = owned(folder, 0o755)
        good, line = works(shop.export(place), place, user=NOBODY)
        again = works(shop.export(place, "--overwrite", dtype="fp32"), place, user=NOBODY)
        return good and again[0], f"{line}, {again[1]}"

    @case("places", "a sticky parent of another user")
    def sticky(shop: Shop, folder: Path) -> tuple[bool, str]:
        place = owned(folder, 0o1777)
        os.chown(place, 0, 0)
        os.chmod(place, 0o777)
        return works(shop.export(place), place, user=NOBODY)

    @case("places", "one that may not be written to")
    def closed(shop: Shop, folder: Path) -> tuple[bool, str]:
        (folder / "out").mkdir(mode=0o755)
        arguments = shop.export(folder / "out")
        return refused(arguments, folder, 4, "may not be written to", user=NOBODY)

    @case("places", "a volume", mounts=True)
    def volume(shop: Shop, folder: Path) -> tuple[bool, str]:
        with mounted(folder / "out") as place:
            good, line = works(shop.export(place), place)
            again = works(shop.export(place, "--overwrite", dtype="fp32"), place)
        return good and again[0], f"{line}, {again[1]}"

    @case("places", "a volume with lost+found", mounts=True)
    def found(shop: Shop, folder: Path) -> tuple[bool, str]:
        with mounted(folder / "out") as place:
            (place / "lost+found").mkdir()
            good, line = works(shop.export(place), place)
            return good and (place / "lost+found").is_dir(), line

    @case("places", "a folder of the same file system, mounted", mounts=True)
    def bound(shop: Shop, folder: Path) -> tuple[bool, str]:
        for name in ("real", "out"):
            (folder / name).mkdir()
        source, target = os.fsencode(folder / "real"), os.fsencode(folder / "out")
        if LIBC.mount(source, target, None, BIND, None):
            return False, "no bind mount"
        try:
            return works(shop.export(folder / "out"), folder / "out")
        finally:
            LIBC.umount2(target, DETACH)

    @case("places", "a read-only volume", mounts=True)
    def read_only(shop: Shop, folder: Path) -> tuple[bool, str]:
        with mounted(folder / "out") as place:
            LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", REMOUNT | READ_ONLY, None)
            return refused(shop.export(place), folder, 4, "may not be written to")

    @case("places", "a volume that is too small", mounts=True)
    def small(shop: Shop, folder: Path) -> tuple[bool, str]:
        with mounted(folder / "out", options=b"size=64k") as place:
            return refused(shop.export(place), folder, 4, "the export needs")
