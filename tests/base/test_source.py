"""Laws of names: what is a path, what is looked up on the hub, and what is said without one."""

from __future__ import annotations

import pytest
from families import refused, save_checkpoint

from qlora_kit.base.source import SHORT_NAMES, contained, is_path, resolve
from qlora_kit.errors import ModelError, UnsafeInputError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "llama-7b").mkdir()
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./model", True),
        ("../model", True),
        ("/abs/model", True),
        ("~/model", True),
        (".", True),
        ("a/b/c", True),
        ("owner/name", True),  # its first part is a directory here
        ("model", True),
        ("nobody/name", False),
        ("llama-7b", False),  # a short name stays one, and so does tiny
        ("tiny", False),
        ("unknown", False),
        ("model/", True),
    ],
)
def test_a_name_is_a_path_by_its_looks_and_by_what_is_here(name, path):
    assert is_path(name) is path


def test_a_name_that_looks_like_a_path_is_never_looked_up(tmp_path):
    for name in ("./absent", "owner/absent", "a/b/c", "~/absent-model-directory"):
        with refused(ModelError, name, "no such directory", directory=tmp_path):
            resolve(name)


def test_an_unknown_short_name_lists_the_known_ones(tmp_path):
    known = ("neither a directory here nor", "owner/name for a hub id", "tiny, llama-7b")
    with refused(ModelError, *known, directory=tmp_path):
        resolve("unknown")


def test_short_names_stand_for_hub_ids():
    assert all(hub_id.count("/") == 1 for hub_id in SHORT_NAMES.values())


def test_a_directory_keeps_its_own_name(tmp_path):
    save_checkpoint(tmp_path / "model")
    assert resolve("model").name == "model"
    assert resolve(f"{tmp_path}/./model/").name == "model"
    assert resolve("./model").revision is None


@pytest.mark.parametrize("relative", ["", "/etc/hosts", "../x", "a/../../x", "a\0b", "y" * 5000])
def test_paths_that_leave_are_refused_before_anything_is_opened(tmp_path, relative):
    with refused(UnsafeInputError, directory=tmp_path):
        contained(tmp_path / "model", relative)


def test_a_missing_file_is_named(tmp_path):
    with refused(ModelError, "model/absent.json: no such file", directory=tmp_path):
        contained(tmp_path / "model", "absent.json")
    (tmp_path / "model" / "file").touch()
    with refused(ModelError, "no such file", directory=tmp_path):
        contained(tmp_path / "model", "file/inside")
    with refused(UnsafeInputError, "is not a regular file", directory=tmp_path):
        contained(tmp_path, "model")
    assert contained(tmp_path / "model", "file") == tmp_path / "model" / "file"
