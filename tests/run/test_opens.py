"""A start opens each file of its base and of its adapter once: what a file says is handed on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from qlora_kit.base.source import TINY

COUNTED = """
import collections, json, os, sys

roots, starts, found = sys.argv[1].split(os.pathsep), json.loads(sys.argv[2]), []


def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(args[0]))
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if os.path.dirname(path) in roots and not (args[2] or 0) & writes:
            found.append("/".join(path.split(os.sep)[-2:]))


sys.addaudithook(hook)
from qlora_kit.commands.finetune import main
from qlora_kit.errors import ConfigError
from qlora_kit.run.run import Run

shared = "--data sample --eval_fraction 0 --max_steps 1 --save_steps 0".split()
main(["--model", "./base", "--output_dir", "adapter", *shared])


def begin(self, log, bar):  # the model is loaded, and its first step would be next
    raise ConfigError("enough", "count")


Run.begin, counts = begin, []
for options in starts:
    found.clear()
    assert main([*options, "--output_dir", "again", *shared]) == 2
    counts.append(collections.Counter(found))
print("OPENED", json.dumps(counts), flush=True)
"""
"""Trains an adapter; then for each start the files of some folders that are opened before a step.

In a process of its own, for nothing takes such a hook away again.
"""
STARTS = {
    "base": ("--model", "./base"),
    "adapter": ("--adapter", "adapter"),
    "both": ("--adapter", "adapter", "--model", "./base"),
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """How often each start opens each file, by `folder/name`."""
    home = tmp_path_factory.mktemp("opens")
    shutil.copytree(TINY, home / "base")
    roots = os.pathsep.join((str(home / "base"), str(home / "adapter")))
    command = [sys.executable, "-c", COUNTED, roots, json.dumps([*STARTS.values()])]
    ran = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("OPENED "))
    return dict(zip(STARTS, json.loads(line.removeprefix("OPENED ")), strict=True))


@pytest.mark.parametrize("start", STARTS)
def test_a_start_opens_each_file_once(counts: dict[str, dict[str, int]], start: str) -> None:
    once = {
        *("base/config.json", "base/generation_config.json", "base/tokenizer.json"),
        *("base/tokenizer_config.json", "base/chat_template.jinja"),
    }
    # Weights twice: for header, samples and hash before anything is trained, and to be read.
    twice = {"base/model.safetensors"}
    if "adapter" in STARTS[start]:
        once |= {"adapter/adapter_config.json", "adapter/config.yaml"}
        once |= {"adapter/chat_template.jinja"}
        twice |= {"adapter/adapter_model.safetensors"}
    # transformers reads the tokenizer through links of its own (`staged`), which are not counted.
    assert counts[start] == {**dict.fromkeys(once, 1), **dict.fromkeys(twice, 2)}
