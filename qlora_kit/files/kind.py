"""What a file is whatever it is called, told by its first bytes.

Downloads that went wrong leave files under the right name: a pointer of git-lfs in place of the
weights, the page of a login, an archive, a pickle. "Corrupt safetensors" or "not JSON" is true of
each and helps nobody. Only the beginning is read, and nothing of it is believed: what is told is
shown in an error, never acted on.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qlora_kit.errors import InputError, UnsafeInputError

BEGINNING = 512


class FileKind(NamedTuple):
    """What a file is, what to do about it, and whether reading it as what it is could run code."""

    name: str
    remedy: str
    runs_code: bool = False


_PICKLE = FileKind(
    "a pickle, which can run code when it is read",
    "convert it to safetensors (transformers: save_pretrained) where you trust it",
    runs_code=True,
)
SAFETENSORS = FileKind("a safetensors file", "put the file of that name in its place")
_POINTER = "fetch the file that it stands for: git lfs pull, or hf download"
_UNPACK = "unpack it, and give what is in it"
_STARTS: dict[bytes, FileKind] = {
    b"version https://git-lfs.github.com/": FileKind("a git-lfs pointer", _POINTER),
    b"version https://hawser.github.com/": FileKind("a git-lfs pointer", _POINTER),
    b"# xet version": FileKind("a git-xet pointer", _POINTER),
    b"/annex/objects/": FileKind("a git-annex pointer", "fetch the file: git annex get"),
    b"\x1f\x8b": FileKind("a gzip archive", _UNPACK),
    b"BZh": FileKind("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\x00": FileKind("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": FileKind("a zstd archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": FileKind("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": FileKind("a rar archive", _UNPACK),
    b"GGUF": FileKind("a GGUF file", "give the model's safetensors: GGUF is not read"),
    b"ggml": FileKind("a GGML file", "give the model's safetensors: GGML is not read"),
    b"tjgg": FileKind("a GGML file", "give the model's safetensors: GGML is not read"),
    b"\x89HDF\r\n\x1a\n": FileKind("an HDF5 file", "give the model's safetensors"),
    b"\x93NUMPY": FileKind("a NumPy array", "give the model's safetensors"),
    b"PAR1": FileKind("a Parquet file", "put the file of that name in its place"),
    b"%PDF-": FileKind("a PDF", "fetch the file again"),
    b"\x7fELF": FileKind("a program", "fetch the file again"),
    b"SQLite format 3\x00": FileKind("an SQLite database", "fetch the file again"),
}


def file_kind(start: bytes) -> FileKind | None:
    """What a file that begins like this is; None for a plain text and for what cannot be told."""
    start = start[:BEGINNING]
    if start[4:9] == b"\0\0\0\0{":
        return SAFETENSORS  # eight bytes of length: the first of them may look like a pickle's
    if start.startswith(b"PK\x03\x04"):
        # torch's zip has its pickle as the first entry, stored and not deflated.
        return _PICKLE if b"/data.pkl" in start[:200] else FileKind("a zip archive", _UNPACK)
    for sign, kind in _STARTS.items():
        if start.startswith(sign):
            return kind
    # Protocols 2 to 5; the older ones are text, of which these are what they begin with.
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if start.startswith((b"ccollections\n", b"ctorch\n", b"c__builtin__\n", b"cposix\n", b"(dp0")):
        return _PICKLE
    if start[257:262] == b"ustar":
        return FileKind("a tar archive", _UNPACK)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return FileKind("an HTML page", "fetch the file again: a page was saved in its place")
    if text.startswith(b"<?xml"):
        return FileKind("an XML document", "fetch the file again: an answer was saved in its place")
    if len(start) > 8 and not start.strip(b"\0"):
        return FileKind("a file of zeros", "fetch the file again: it was not written to its end")
    return None


def refuse_kind(
    path: Path,
    error: type[InputError],
    expected: FileKind | None = None,
    *,
    start: bytes | None = None,
) -> None:
    """Refuse a file that is something else than its name says, by what it is.

    `start` are its first bytes, or more of it; without them the file is opened. `expected` is
    `SAFETENSORS` for weights, None for text. Errors: `error`, `UnsafeInputError` for a pickle.
    """
    if start is None:
        with open(path, "rb") as file:
            start = file.read(BEGINNING)
    kind = file_kind(start)
    if kind is None and expected is SAFETENSORS:
        kind = _text(start)
    if kind is not None and kind != expected:
        raise (UnsafeInputError if kind.runs_code else error)(
            f"{path}: is {kind.name}", kind.remedy
        )


def _text(start: bytes) -> FileKind | None:
    """A short text where weights belong: what a server answered in their place."""
    line = start[:BEGINNING].strip().split(b"\n")[0]
    if len(line) > 8 and line.isascii() and line.decode().isprintable():
        return FileKind(f"a text ({line[:60].decode()!r})", "fetch the file again")
    return None
