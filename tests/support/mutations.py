"""Seeded damage to real files: each kind takes a path and a random state, and changes one thing.

Kinds are grouped by what they understand: any file (bytes and places), any text, JSON, a
safetensors file. `kinds_of` says which apply to a file; the same seed gives the same damage. Used
by the suite and by `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from random import Random

from header_mutations import Kind, header_kinds
from json_mutations import CHANGES, VALUES, Change, edited

# Any file: where it is, and its bytes


def deleted(path: Path, draw: Random) -> None:
    path.unlink()


def directory_instead(path: Path, draw: Random) -> None:
    path.unlink()
    path.mkdir()


def linked_outside(path: Path, draw: Random) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(outside)


def linked_to_nothing(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["nowhere", "../blobs/0123abcd", "/nowhere/at/all"]))


def something_else_instead(path: Path, draw: Random) -> None:
    contents = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
        b"<!DOCTYPE html><html></html>",
        gzip.compress(b"{}"),
        b"PK\x03\x04" + bytes(60),
        b"GGUF\x03" + bytes(60),
        b"\x80\x04]\x94.",
        b"Entry not found",
        bytes(600),
    )
    path.write_bytes(draw.choice(contents))


def linked_in_a_loop(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def linked_to_a_device(path: Path, draw: Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem"]))


def pipe_instead(path: Path, draw: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def swapped_with_another(path: Path, draw: Random) -> None:
    others = sorted(one for one in path.parent.iterdir() if one != path)
    other = draw.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def emptied(path: Path, draw: Random) -> None:
    path.write_bytes(b"")


def cut(path: Path, draw: Random) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice([size - 1, size // 2, draw.randrange(size)]))


def appended(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes() + draw.choice([b"\0", b"}", b"\n{}", draw.randbytes(40)]))


def grown(path: Path, draw: Random) -> None:
    os.truncate(path, 17 * 1024**2)


def bit_flipped(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def bytes_overwritten(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    count = min(draw.choice([1, 4, 64]), len(content) - at)
    content[at : at + count] = draw.choice([bytes(count), b"\xff" * count, draw.randbytes(count)])
    path.write_bytes(content)


def bytes_moved(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    first, second = sorted((draw.randrange(len(content)), draw.randrange(len(content))))
    path.write_bytes(content[:first] + content[second:] + content[first:second])


def noise_instead(path: Path, draw: Random) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(1, 2000)))


ANY = (deleted, directory_instead, linked_outside, linked_in_a_loop, linked_to_a_device)
ANY = (*ANY, pipe_instead, swapped_with_another, emptied, cut, appended, grown, bit_flipped)
ANY = (*ANY, bytes_overwritten, bytes_moved, noise_instead, linked_to_nothing)
ANY = (*ANY, something_else_instead)


# Text


def not_utf8(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    at = draw.randrange(len(content) + 1)
    path.write_bytes(
        content[:at] + draw.choice([b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"]) + content[at:]
    )


def utf16(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def line_repeated(path: Path, draw: Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    at = draw.randrange(len(lines))
    path.write_text("".join([*lines[:at], *[lines[at]] * draw.choice([2, 50]), *lines[at + 1 :]]))


TEXT = (not_utf8, utf16, line_repeated)


# JSON


def json_kind(change: Change) -> Kind:
    """The kind of a function that changes a document."""

    def kind(path: Path, draw: Random) -> None:
        path.write_text(edited(path.read_text(), lambda document: change(document, draw)))

    kind.__name__ = change.__name__
    return kind


def root_replaced(path: Path, draw: Random) -> None:
    path.write_text(draw.choice(VALUES))


JSON = (root_replaced, *map(json_kind, CHANGES))


# What a directory holds besides


def pickle_instead(path: Path, draw: Random) -> None:
    owner = "adapter" if path.name.startswith("adapter") else "pytorch"
    path.rename(path.with_name(f"{owner}_model.bin"))


def code_beside(path: Path, draw: Random) -> None:
    document = json.loads(path.read_text())
    document["auto_map"] = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    path.write_text(json.dumps(document))
    path.with_name("own.py").write_text("raise SystemExit('code of a model was run')")


def kinds_of(path: Path) -> dict[str, Kind]:
    """The kinds of damage that a file can take, by name."""
    kinds: tuple[Kind, ...] = ANY
    if path.suffix in (".json", ".jinja", ".yaml"):
        kinds = (*kinds, *TEXT)
    if path.suffix == ".json":
        kinds = (*kinds, *JSON, code_beside)
    if path.suffix == ".safetensors":
        kinds = (*kinds, *header_kinds(path), pickle_instead)
    return {kind.__name__: kind for kind in kinds}
