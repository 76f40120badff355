"""Tests that run in a process of their own, for what they do to the process lasts.

The test is collected, parametrized and given its fixtures as any other; its body runs in the one
other process, which imports the test's module by itself. What goes there has to be picklable.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import importlib, os, pickle, sys, traceback
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what a test prints is no answer
while True:
    try:
        folder, module, name = pickle.load(sys.stdin.buffer)
        arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    answer = None
    try:
        if folder not in sys.path:
            sys.path.insert(0, folder)
        getattr(importlib.import_module(module), name)(**pickle.loads(arguments))
    except BaseException:
        answer = traceback.format_exc()
    pickle.dump(answer, answers)
    answers.flush()
"""


class OwnProcess:
    """A process that runs functions of test modules, one after another."""

    def __init__(self) -> None:
        support = Path(__file__).resolve().parent
        paths = os.pathsep.join((str(ROOT), str(support), os.environ.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def call(self, path: Path, name: str, arguments: Mapping[str, Any]) -> None:
        """Run a function of the module in a file; it fails here with the traceback from there."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump((str(path.parent), path.stem, name), self._process.stdin)
            pickle.dump(pickle.dumps(dict(arguments)), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            answer = f"the process ended with code {self._process.wait()}"
        if answer is not None:
            pytest.fail(answer, pytrace=False)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
