"""Laws of the base cache where processes come at once, or are killed while they write."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import save_checkpoint

from qlora_kit.base import cache as base_cache
from qlora_kit.base.cache import wanted
from qlora_kit.base.kept_base import listed
from qlora_kit.base.load import read_weights
from qlora_kit.base.open import open_base
from qlora_kit.config.base import BaseConfig

EVENTS = ("open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of one test, in which small bases are kept too."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache" / "bases"))
    for name, value in {"SMALLEST": 0, "JUST_NOW": 0.0, "LEFT_FREE": 0}.items():
        monkeypatch.setattr(base_cache, name, value)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def model(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model", "llama_bias", torch.bfloat16, num_hidden_layers=1)
    return tmp_path / "model"


def load(directory, **options):
    """The tensors of a base, and whether they came from the cache."""
    base = open_base(BaseConfig(str(directory), dtype="fp32", device="cpu", **options))
    notes = [note for note in base.notes if "from the cache" in note]
    return read_weights(base).state_dict(), bool(notes)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def forked(work) -> int:
    """Have a process of its own do it; 1 where it raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        code = 0 if work() else 2
    except BaseException:
        code = 1
    os._exit(code)


def killed_at(number: int, cache: Path) -> None:
    """This process ends at that call of those that change or open something in the cache."""
    seen = [0]

    def hook(event, args):
        if event in EVENTS and str(cache) in str(args[0]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_processes_at_once_leave_one_entry_and_have_the_same_base(model, cache):
    truth, _ = load(model, base_cache=False)
    children = [forked(lambda: equal(load(model)[0], truth)) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert len(listed(cache)) == len(os.listdir(cache)) == 1
    found, is_kept = load(model)
    assert is_kept
    assert equal(found, truth)


def test_readers_and_clearers_at_once_do_no_harm(model, cache):
    truth, _ = load(model)

    def clear():
        for _ in range(5):
            for one in listed(cache):
                shutil.rmtree(one.path, ignore_errors=True)
        return True

    def read():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return all(equal(load(model)[0], truth) for _ in range(3))

    children = [forked(work) for work in (read, clear, read)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 3
    assert equal(load(model)[0], truth)
    assert load(model)[1]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_call_leaves_nothing_that_is_used_and_torn(model, cache, replaces):
    truth, _ = load(model, base_cache=False)
    number, ends = 1, []
    while 0 not in ends:
        shutil.rmtree(cache, ignore_errors=True)
        if replaces:
            load(model)
            os.utime(model / "model.safetensors")  # another source, as far as anybody knows
        base = open_base(BaseConfig(str(model), dtype="fp32", device="cpu"))

        def work(number=number, base=base):
            killed_at(number, cache)
            return equal(read_weights(base).state_dict(), truth)

        ends.append(os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]))
        assert ends[-1] in (0, -signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert equal(read_weights(base).state_dict(), truth)
        assert wanted(base).found() is not None
        (entry,) = os.listdir(cache)  # and what the dead one left is gone
        assert not entry.startswith(".")
        number += 4 if replaces else 1  # where one is replaced every fourth call, for time
    assert number > 10


def test_a_disk_that_ends_in_the_middle_keeps_nothing(model, cache):
    """A limit on the size of files stands for it: the system refuses a write that was begun."""
    truth, _ = load(model, base_cache=False)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 + 60_000, 2**20 + 60_000))
        notes: list[str] = []
        base = open_base(BaseConfig(str(model), dtype="fp32", device="cpu"))
        found = read_weights(base, note=notes.append).state_dict()
        return "is not kept in" in notes[0] and equal(found, truth) and not os.listdir(cache)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == 0
    assert not load(model)[1]
    assert load(model)[1]
