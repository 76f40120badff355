"""Publishing, as a table: every place an export or a page may be asked to go to, and kills.

In a mount namespace of its own (root is needed; without it what needs a mount is skipped, and said)
each case runs a command in a forked process and looks at its exit code and at what is on disk.
Then an export is killed after every call that changes a directory: over an old one beside it, into
a volume, and into the working directory. After each kill the old or the new export is whole once
the next export has looked, and the next one works and leaves nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from families import save_checkpoint  # noqa: E402
from record import make_parser, write_result  # noqa: E402
from trained import save_trained, write_rows  # noqa: E402

from qlora_kit.commands.main import main as command  # noqa: E402
from qlora_kit.files.lock import locked  # noqa: E402
from qlora_kit.files.publish import mend  # noqa: E402

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACE, PRIVATE, BIND, READ_ONLY, REMOUNT, DETACH = 0x20000, 0x44000, 0x1000, 1, 32, 2
NOBODY = 65534
CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink", "link", "symlink")
MARK = '{"merge_base": "original", "dtype": "bf16"}'


@dataclass
class Shop:
    """A base, an adapter on it and rows, and a folder for each case."""

    root: Path
    namespace: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def export(self, place: Path | str, *more: object, dtype: str = "bf16") -> list[str]:
        """The arguments of an export to `place`."""
        known = ("--adapter", self.root / "adapter", "--model", self.root / "base")
        verify = ("--verify", self.root / "rows.jsonl", "--dtype", dtype)
        return [str(one) for one in ("export", *known, *verify, "--output_dir", place, *more)]

    def page(self, place: Path, data: Path) -> list[str]:
        """The arguments of show-data with a page."""
        known = ("--model", self.root / "base", "--data", data, "--token_cache", "none")
        return [str(one) for one in ("show-data", *known, "--html", place)]


def run(
    arguments: list[str],
    *,
    user: int = 0,
    folder: Path | None = None,
    home: str | None = "/nowhere",
    kill_after: int = 0,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """A command in a forked process: its exit code (or minus the signal), and its last line.

    `kill_after` ends it after so many calls that change a directory; `meanwhile` is called in it
    once the first file of an export is written.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            code = 99
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                if folder is not None:
                    os.chdir(folder)
                os.environ.pop("XDG_CACHE_HOME", None)
                os.environ.pop("HOME", None)
                if home is not None:
                    os.environ["HOME"] = home
                if user:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                _watch(kill_after, meanwhile)
                code = command(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        said.seek(0)
        lines = said.read().splitlines() or [""]
    return status, lines[-1]


def _watch(kill_after: int, meanwhile: Callable[[], None] | None) -> None:
    """Count the calls that change a directory, from inside the process."""
    seen = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            here = seen
            try:
                return call(*arguments, **options)
            finally:
                if here == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if meanwhile is not None and str(arguments[-1]).endswith("model.safetensors"):
                    meanwhile()

        return wrapped

    if kill_after or meanwhile:
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))


def tree(folder: Path) -> dict[str, str]:
    """What is below a folder: the hash of each file; a lock that nobody holds says nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def mounted(place: Path, kind: bytes = b"tmpfs", options: bytes = b"size=16m") -> Iterator[Path]:
    """A volume at `place`."""
    place.mkdir(exist_ok=True)
    if LIBC.mount(kind, os.fsencode(place), kind, 0, options):
        raise OSError(ctypes.get_errno(), f"mount {place}")
    try:
        yield place
    finally:
        LIBC.umount2(os.fsencode(place), DETACH)


Case = Callable[[Shop, Path], tuple[bool, str]]
CASES: dict[str, tuple[str, bool, Case]] = {}
"""A name to its area, whether it needs a mount namespace, and what tries it."""


def case(area: str, name: str, mounts: bool = False) -> Callable[[Case], Case]:
    """Put a case on the list."""

    def add(tried: Case) -> Case:
        CASES[name] = (area, mounts, tried)
        return tried

    return add


def refused(
    arguments: list[str], watched: Path, code: int, words: str, **how: Any
) -> tuple[bool, str]:
    """Whether a command is refused with these words, and nothing changes below `watched`."""
    before = tree(watched)
    found, line = run(arguments, **how)
    return (found == code and words in line and tree(watched) == before), f"exit {found}: {line}"


def works(arguments: list[str], place: Path, **how: Any) -> tuple[bool, str]:
    """Whether an export works, and there is nothing beside it."""
    known = set(os.listdir(place.parent)) | {place.name}
    code, line = run(arguments, **how)
    left = set(os.listdir(place.parent)) - known
    left |= {name for name in os.listdir(place) if name.startswith(".")} if place.is_dir() else left
    whole = (place / "export.json").is_file() and (place / "model.safetensors").is_file()
    return code == 0 and whole and not left, f"exit {code}: {line} {sorted(left) or ''}"


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


def _page_cases() -> None:
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


def _overwrite_cases() -> None:
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


def _place_cases() -> None:
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


def _meanwhile_cases() -> None:
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


def _cache_cases() -> None:
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


def kills(shop: Shop, kind: str, folder: Path) -> dict[str, Any]:
    """Kill an export after each of its calls that change a directory, over an old export."""
    with contextlib.ExitStack() as held:
        place = folder / "out"
        if kind == "a volume":
            held.enter_context(mounted(place, options=b"size=64m"))
        place.mkdir(exist_ok=True)
        how = {"folder": place} if kind == "the working directory" else {}
        where = "." if how else str(place)
        # `.` may not be replaced with --overwrite: there the place is empty before.
        more = () if how else ("--overwrite",)
        run(shop.export(folder / "ref_new"))
        run(shop.export(folder / "ref_old", dtype="fp32"))
        new, old = tree(folder / "ref_new"), {} if how else tree(folder / "ref_old")
        counts = {"kills": 0, "old": 0, "new": 0, "faults": list[str]()}
        for number in range(1, 10_000):
            for left in list(place.iterdir()):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not how:
                shutil.copytree(folder / "ref_old", place, dirs_exist_ok=True)
            code, line = run(shop.export(where, *more), kill_after=number, **how)
            if code == 0:
                return counts
            counts["kills"] += 1
            if code != -signal.SIGKILL:
                counts["faults"].append(f"call {number}: exit {code}: {line}")
                continue
            mend(place)
            now = tree(place)
            which = "new" if now == new else "old" if now == old else ""
            if number % 20 == 0:
                print(f"{kind}: {number} kills", flush=True)
            if which:
                counts[which] += 1
            else:
                counts["faults"].append(f"call {number}: neither is whole: {sorted(now)}")
            if now == new and how:
                continue  # it is there, and the working directory's is not replaced
            code, line = run(shop.export(where, *more), **how)
            names = set(os.listdir(folder)) - {"out", "ref_new", "ref_old"}
            if code or tree(place) != new or names:
                counts["faults"].append(f"call {number}: the next: exit {code}: {line} {names}")
    raise AssertionError


def main() -> int:
    parser = make_parser(__doc__, "publishing")
    parser.add_argument("--case", help="the cases whose name has this text, and no kills")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    namespace = LIBC.unshare(NAMESPACE) == 0 and LIBC.mount(b"none", b"/", None, PRIVATE, None) == 0
    for add in (_page_cases, _overwrite_cases, _place_cases, _meanwhile_cases, _cache_cases):
        add()
    table: dict[str, dict[str, Any]] = {}
    faults = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        os.umask(0o022)
        shop = Shop(root / "shop", namespace)
        save_checkpoint(shop.root / "base")
        save_trained(shop.root / "base", shop.root / "adapter", bits=4, dtype="fp32")
        write_rows(shop.root / "rows.jsonl")
        for path in shop.root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # other users read it in some cases
        # Everything is imported once: forked processes, other users' too, have it then.
        with contextlib.redirect_stdout(io.StringIO()):
            command(shop.export(root / "first"))
            command(shop.page(root / "first.html", shop.root / "rows.jsonl"))
        for number, (called, (area, mounts, tried)) in enumerate(CASES.items()):
            row = table.setdefault(area, {"tried": 0, "held": 0, "skipped": 0})
            if arguments.case and arguments.case not in called:
                continue
            if (mounts and not namespace) or (os.getuid() and area != "html"):
                row["skipped"] += 1
                continue
            (root / f"{number}").mkdir()
            held, said = tried(shop, root / f"{number}")
            row["tried"] += 1
            row["held"] += held
            if not held:
                faults.append(f"{area}, {called}: {said}")
                print(faults[-1], flush=True)
        for kind in ("beside", "a volume", "the working directory"):
            if arguments.case or (kind == "a volume" and not namespace):
                continue
            (root / kind).mkdir()
            counts = kills(shop, kind, root / kind)
            faults += [f"killed, {kind}, {one}" for one in counts["faults"]]
            held = counts["kills"] - len(counts.pop("faults"))
            table[f"killed, {kind}"] = {"tried": counts["kills"], "held": held, **counts}
            print(kind, table[f"killed, {kind}"], flush=True)
    took = round(time.perf_counter() - began, 1)
    print(json.dumps(table, indent=1))
    if not arguments.case:
        print(write_result(arguments, {"seconds": took, "table": table, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
