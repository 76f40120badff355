"""Laws of damaged files: whatever is done to one, it is accepted or refused, and nothing is hurt.

A small part of `benchmarks/fuzz.py`, whose 10,000 mutants are in `benchmarks/results/fuzz.json`;
and the error branches of what looks at them first, each of which damage reaches.
"""

from __future__ import annotations

import itertools
import random
import shutil

import pytest
import torch
from benchmark import run_benchmark
from families import save_checkpoint
from mutations import kinds_of
from raises import raises_of, sites_of

from qlora_kit.base.checks import (
    check_architecture,
    check_layers,
    read_base,
    read_config,
    read_context,
)
from qlora_kit.base.json_file import read_json
from qlora_kit.base.safetensors_file import read_entries
from qlora_kit.base.source import Source
from qlora_kit.errors import ModelError, QloraKitError

CHECKS = ("base/safetensors_file", "base/checks")
DAMAGED = {
    "single": ("config.json", "generation_config.json", "model.safetensors"),
    "sharded": ("model.safetensors.index.json", "model-00002-of-00004.safetensors"),
}


def test_damaged_files_of_every_kind_are_accepted_or_refused(tmp_path):
    result = run_benchmark("fuzz", tmp_path, "--count", "50")
    assert result["findings"] == []
    assert result["mutants"] == 50 == sum(result["outcomes"].values())
    assert {"accepted", "ModelError", "AdapterError", "UnsafeInputError"} <= set(result["outcomes"])
    assert len({kind for kinds in result["files"].values() for kind in kinds}) > 30
    assert len(result["files"]) >= 14


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    save_checkpoint(root / "single")
    save_checkpoint(root / "sharded", shard_size="150KB")
    return root


def test_every_error_branch_of_the_checks_is_reached_by_damage(originals, tmp_path):
    """All but the one of a file that vanishes between two looks, which a name gives."""
    expected = {
        name: torch.Size(entry.shape) for name, entry in read_entries(originals / "single").items()
    }
    branches = {
        (module, line): text for module in CHECKS for line, text in raises_of(module).items()
    }
    assert len(branches) > 15
    errors, mutant, left = [], tmp_path / "mutant", set(branches)
    with pytest.raises(ModelError, match="no such file") as caught:
        read_json(tmp_path / "missing.json")
    left -= sites_of(caught.value)
    # What only show-data reads, of a config that it need not believe otherwise.
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "config.json").write_text('{"max_position_embeddings": -5}')
    with pytest.raises(ModelError, match="max_position_embeddings is -5") as caught:
        read_context(tmp_path / "context")
    left -= sites_of(caught.value)
    for number, (directory, names) in itertools.product(range(10), DAMAGED.items()):
        for name in names:
            for kind in kinds_of(originals / directory / name) if left else ():
                shutil.rmtree(mutant, ignore_errors=True)
                shutil.copytree(originals / directory, mutant)
                path = mutant / name
                kinds_of(path)[kind](path, random.Random(f"{kind} {number}"))
                try:
                    read_base(Source("mutant", None, mutant))
                    entries = read_entries(mutant)
                    check_layers(entries, read_config(mutant), mutant / "config.json")
                    check_architecture(entries, expected, {}, mutant)
                except QloraKitError as error:
                    errors.append(error)
                    left -= sites_of(error)
    assert all(str(tmp_path) in error.problem and error.remedy for error in errors)
    assert [branches[site] for site in sorted(left)] == []
