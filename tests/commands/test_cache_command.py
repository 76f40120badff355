"""Laws of the base cache over commands: what is kept and used is said, listed and deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_kit.base import cache as base_cache
from qlora_kit.base.kept_base import listed
from qlora_kit.base.load import load_base


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of one test, in which small bases are kept too."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "kept"))
    for name, value in {"SMALLEST": 0, "JUST_NOW": 0.0, "LEFT_FREE": 0}.items():
        monkeypatch.setattr(base_cache, name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "kept"


def trained(run, workshop, output_dir, *more):
    done = run(
        *("finetune", "--model", workshop.base, "--data", workshop.rows, "--dtype", "fp32"),
        *("--output_dir", output_dir, "--eval_fraction", 0, "--max_steps", 2),
        *("--gradient_accumulation_steps", 1, "--max_length", 64, "--token_cache", "none"),
        *("--lora_dropout", 0.1, "--save_steps", 1, *more),
    )
    assert done.code == 0, done.err
    return done


def keep(workshop, **options):
    load_base(str(workshop.base), dtype="fp32", device="cpu", **options)


def test_adapters_trained_on_a_kept_base_are_the_same_to_the_last_bit(run, workshop, cache):
    first = trained(run, workshop, "one")
    assert "kept in the cache for the next start" in first.out
    second = trained(run, workshop, "two")
    assert "quantized base from the cache (" in second.out
    without = trained(run, workshop, "three", "--no_base_cache")
    assert "cache" not in without.out.replace("token_cache", "")
    files = [Path(name) / "adapter_model.safetensors" for name in ("one", "two", "three")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert load_file(files[0])
    # And a run goes on with the cache or without it.
    again = "--resume_from_checkpoint", "two/checkpoint-1", "--no_base_cache"
    trained(run, workshop, "four", *again)
    assert (Path("four") / "adapter_model.safetensors").read_bytes() == files[0].read_bytes()


def test_what_is_kept_is_listed_and_deleted(run, workshop, cache):
    assert "0 quantized bases" in run("cache").out
    keep(workshop)
    keep(workshop, bits=8)
    shown = run("cache")
    assert "2 quantized bases" in shown.out
    assert "4 bits, nf4 in double quant, for fp32, made on cpu" in shown.out
    said = json.loads(run("cache", "--json").out)
    assert said["directory"] == str(cache)
    assert said["bytes"] == sum(path.stat().st_size for path in cache.rglob("*.*"))
    eight = next(one for one in said["bases"] if one["settings"]["bits"] == 8)
    assert eight["model"] == str(workshop.base.resolve())
    cleared = run("cache", "--clear", eight["name"], "--json")
    assert json.loads(cleared.out)["removed"] == [eight["name"]]
    assert [path.name for path in cache.iterdir()] != [eight["name"]]
    assert f"deleted   {workshop.base.name}" in run("cache", "--clear", workshop.base.name).out
    assert list(cache.iterdir()) == []


def test_nothing_else_is_deleted(run, workshop, cache):
    keep(workshop)
    (entry,) = cache.iterdir()
    (cache / "mine").mkdir()
    strange = cache / "strange-0123456789abcdef"
    strange.mkdir()
    (strange / "thesis.tex").write_text("x")
    (cache / "link-0123456789abcdef").symlink_to(strange)
    (cache / ".mine.1.tmp").mkdir()
    (cache / f".{entry.name}.999999999.tmp").mkdir()  # of a killed process
    foreign = cache / f".{entry.name}.7.old"  # a name that a killed process may leave
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for name in ("mine", strange.name, "link-0123456789abcdef", "..", "./mine"):
        refused = run("cache", "--clear", name)
        assert refused.code == 2
        assert refused.line.startswith(f"error: clear {name}: no quantized base of that name")
    assert run("cache", "--clear", "all").code == 0
    left = {"mine", strange.name, "link-0123456789abcdef", ".mine.1.tmp", foreign.name}
    assert set(os.listdir(cache)) == left
    keep(workshop)
    assert set(os.listdir(cache)) == left | {entry.name}


COME_AND_GO = """
import os, sys
while True:
    os.mkdir(sys.argv[1])
    os.rmdir(sys.argv[1])
"""


def test_entries_that_come_and_go_meanwhile_end_no_listing(run, cache):
    """As where another process clears the cache: looked at between any two of its calls."""
    cache.mkdir(0o700)
    entry = cache / "model-4bit-0123456789abcdef"
    other = subprocess.Popen([sys.executable, "-SEc", COME_AND_GO, entry])
    try:
        for _ in range(4000):
            listed(cache)
    finally:
        other.kill()
        other.wait()
    assert run("cache", "--clear", "all").code == 0


def test_a_damaged_entry_is_listed_and_deleted(run, workshop, cache):
    keep(workshop)
    (entry,) = cache.iterdir()
    (entry / "base.json").write_text("{")
    assert "will not be used" in run("cache").out
    assert json.loads(run("cache", "--json").out)["bases"][0]["model"] is None
    assert run("cache", "--clear", entry.name).code == 0
    assert not entry.exists()


def test_a_cache_that_others_may_write_to_is_not_cleared(run, workshop, cache):
    keep(workshop)
    cache.chmod(0o777)
    refused = run("cache", "--clear", "all")
    assert refused.code == 4
    assert "this user alone" in refused.line
    assert list(cache.iterdir())
