"""Laws of checkpoints that were damaged, and of resuming with another config than was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal

import pytest
from faults.harness import Fault, damages, result_of

from qlora_kit.errors import CheckpointError, UnsafeInputError
from qlora_kit.training.checkpoint import load_checkpoint, newest
from qlora_kit.training.checkpoint_folder import verify


@pytest.fixture(scope="module")
def stopped(job, tmp_path_factory):
    """The directory of a run that was killed after its fourth checkpoint of five."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    killed = job.run(output, fault=Fault(1, path=".checkpoint-5."))
    assert killed.code == -signal.SIGKILL, killed.output
    assert newest(output)[0].step == 4
    return output


@pytest.fixture
def run_dir(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_every_damage_to_every_file_is_found(run_dir):
    newer, older = run_dir / "checkpoint-4", run_dir / "checkpoint-3"
    files = sorted(newer.iterdir())
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        for how, damage in damages(path):
            damage()
            with pytest.raises((CheckpointError, UnsafeInputError)) as error:
                load_checkpoint(newer)
            assert str(newer) in error.value.problem, (path, how)
            found, notes = newest(run_dir)
            assert found.path == older, (path, how)
            assert len(notes) == 1
            assert "checkpoint-4" in notes[0]
            path.write_bytes(content)
    verify(newer)


def test_every_bit_of_a_manifest_counts(run_dir):
    path = run_dir / "checkpoint-4" / "manifest.json"
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with pytest.raises((CheckpointError, UnsafeInputError)):
            verify(path.parent)


def test_auto_falls_back_and_says_so_and_a_path_fails(job, reference, run_dir):
    path = run_dir / "checkpoint-4" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    named = job.run(run_dir, "--resume_from_checkpoint", str(run_dir / "checkpoint-4"))
    assert named.code == 3, named.output
    assert str(path) in named.error
    resumed = job.run(run_dir, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert "going back before checkpoint-4" in resumed.output
    assert f"going on from {run_dir / 'checkpoint-3'}" in resumed.output
    assert result_of(run_dir) == reference


def test_a_file_that_cannot_be_read_is_passed_over(job, reference, run_dir):
    path = run_dir / "checkpoint-4" / "training.safetensors"
    path.chmod(0)
    resume = ("--resume_from_checkpoint", "auto")
    resumed = job.run(run_dir, *resume, inject="without_privileges")
    assert resumed.code == 0, resumed.output
    assert f"going back before checkpoint-4: {path}: Permission denied" in resumed.output
    assert result_of(run_dir) == reference


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(job, reference, run_dir):
    shutil.copytree(run_dir / "checkpoint-3", run_dir / "checkpoint-90")
    found, notes = newest(run_dir)
    assert found.path == run_dir / "checkpoint-4"
    assert "checkpoint-90 is ignored: it stands after step 3" in notes[0]
    resumed = job.run(run_dir, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert result_of(run_dir) == reference


def test_a_full_disk_never_costs_the_checkpoint_that_a_run_stands_on(job, reference, run_dir):
    """The newer one is damaged: room for a second try is not made by removing the older one."""
    (run_dir / "checkpoint-4" / "state.json").write_bytes(b"{")
    resume = ("--resume_from_checkpoint", "auto")
    failed = job.run(run_dir, *resume, limits={"RLIMIT_FSIZE": 8192})
    assert failed.code == 4, failed.output
    assert newest(run_dir)[0].step == 3
    resumed = job.run(run_dir, *resume)
    assert resumed.code == 0, resumed.output
    assert result_of(run_dir) == reference


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda files: files.pop("state.json"), CheckpointError, "not in the manifest"),
        (lambda files: files.update({"../x": files["state.json"]}), UnsafeInputError, "../x"),
        (lambda files: files.update({"/etc/passwd": {}}), UnsafeInputError, "/etc/passwd"),
        (lambda files: files.update({"more.bin": {"size": 1}}), CheckpointError, "is missing"),
    ],
)
def test_a_manifest_that_was_written_to_deceive(run_dir, change, error, said):
    """With a right checksum of its own, as an attacker would write it."""
    from qlora_kit.training.checkpoint_folder import manifest

    path = run_dir / "checkpoint-4" / "manifest.json"
    files = json.loads(path.read_bytes())["files"]
    change(files)
    path.write_bytes(manifest(files))
    with pytest.raises(error, match=said):
        load_checkpoint(path.parent)


def test_a_run_begun_before_an_option_was_renamed_goes_on(job, reference, run_dir):
    from qlora_kit.training.checkpoint_folder import manifest

    path = run_dir / "checkpoint-4"
    state = json.loads((path / "state.json").read_bytes())
    state["config"]["own_blocks"] = state["config"].pop("fused_blocks")
    content = json.dumps(state).encode()
    (path / "state.json").write_bytes(content)
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    files["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(manifest(files))
    resumed = job.run(run_dir, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    assert f"going on from {path}" in resumed.output
    assert result_of(run_dir) == reference


def test_surplus_files_and_links_are_refused(run_dir):
    path = run_dir / "checkpoint-4"
    (path / "more.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"more\.bin"):
        verify(path)
    (path / "more.bin").unlink()
    content = (path / "state.json").read_bytes()
    (run_dir / "elsewhere").write_bytes(content)
    (path / "state.json").unlink()
    os.symlink(run_dir / "elsewhere", path / "state.json")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        verify(path)


def test_what_only_looks_like_a_checkpoint_is_passed_over(job, reference, run_dir):
    (run_dir / "checkpoint-99").mkdir()
    (run_dir / "checkpoint-abc").mkdir()
    (run_dir / "checkpoint-0010").mkdir()
    (run_dir / "checkpoint-98").write_text("a file")
    resumed = job.run(run_dir, "--resume_from_checkpoint", "auto")
    assert resumed.code == 0, resumed.output
    for name in ("checkpoint-99", "checkpoint-abc", "checkpoint-0010", "checkpoint-98"):
        assert name in resumed.output
        assert (run_dir / name).exists()
    assert result_of(run_dir) == reference


def rewritten(run_dir, **changes):
    """checkpoint-4 with another state, and a manifest that fits it."""
    from qlora_kit.files.atomic import sha256
    from qlora_kit.training.checkpoint_folder import manifest

    path = run_dir / "checkpoint-4"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))
    names = [file for file in sorted(path.iterdir()) if file.name != "manifest.json"]
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in names}
    (path / "manifest.json").write_bytes(manifest(files))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"step": -1},
        {"step": "4"},
        {"progress": {}},
        {"progress": None},
        {"progress": {"step": 4, "surprise": 1}},
        {"progress": {"step": 4, "tokens": None}},
        {"progress": {"step": 4, "first_loss": "low"}},
        {"progress": {"step": 4, "history": [[1]]}},
        {"guard": None},
        {"guard": {"bad_in_a_row": 0, "max_rows": 0}},
        {"guard": {"bad_in_a_row": "0", "max_rows": None}},
        {"optimizer": None},
        {"optimizer": {"model.layers.0.self_attn.q_proj.lora_A.default.weight.step": 1}},
        {"config": None},
        {"identity": []},
    ],
)
def test_a_state_that_makes_no_sense_is_refused(job, run_dir, changes):
    path = rewritten(run_dir, **changes)
    refused = job.run(run_dir, "--resume_from_checkpoint", str(path))
    assert refused.code == 3, refused.output
    assert path.name in refused.error or "checkpoint" in refused.error


@pytest.mark.parametrize(
    ("arguments", "named", "may_be_overridden"),
    [
        (("--lora_r", "2"), "lora_r", False),
        (("--target_modules", "all-linear"), "target_modules", False),
        (("--optim", "adamw_8bit"), "optim", False),
        (("--seed", "1"), "seed", True),
        (("--learning_rate", "0.02"), "learning_rate", True),
        (("--lr_scheduler_type", "linear"), "lr_scheduler_type", True),
        (("--max_steps", "7"), "max_steps", True),
        (("--max_length", "24"), "max_length", True),
    ],
)
def test_another_config_is_refused_unless_it_is_named(
    job, run_dir, arguments, named, may_be_overridden
):
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    resume = (*arguments, "--resume_from_checkpoint", "auto")
    refused = job.run(run_dir, *resume)
    assert refused.code == 2, refused.output
    assert named in refused.error
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    # Other data comes with another length.
    names = named if named != "max_length" else "max_length,data,eval_data"
    again = job.run(run_dir, *resume, "--override", names)
    if not may_be_overridden or named == "max_length":
        assert again.code == 2, again.output
        assert "cannot change" in again.error
    else:
        assert again.code == 0, again.output
        assert f"overridden: {named}" in again.output


def test_other_data_and_another_base_are_refused_whatever_they_are_called(job, run_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(job.directory / "data", data)
    same = job.run(run_dir, "--data", str(data), "--resume_from_checkpoint", "auto", "--dtype", "x")
    assert same.code == 2  # the same rows elsewhere are no difference; only the dtype is wrong
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace("w3", "w4"))
    refused = job.run(run_dir, "--data", str(data), "--resume_from_checkpoint", "auto")
    assert refused.code == 2
    assert "data: other contents" in refused.error
    named = ("--resume_from_checkpoint", "auto", "--override")
    other = run_dir.with_name("other-data")
    shutil.copytree(run_dir, other)
    overridden = job.run(other, "--data", str(data), *named, "data")
    assert overridden.code == 0, overridden.output
    assert "overridden: data: other contents" in overridden.output
    from families import edit_weights

    base = tmp_path / "base"
    shutil.copytree(job.directory / "base", base)
    edit_weights(base, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    refused = job.run(run_dir, "--model", str(base), "--resume_from_checkpoint", "auto")
    assert refused.code == 2
    assert "model: other contents" in refused.error
    overridden = job.run(run_dir, "--model", str(base), *named, "model")
    assert overridden.code == 0, overridden.output
    assert "overridden: model: other contents" in overridden.output


def test_a_checkpoint_can_be_gone_on_from_in_another_directory(job, reference, run_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    path = run_dir / "checkpoint-3"
    resumed = job.run(elsewhere, "--resume_from_checkpoint", str(path))
    assert resumed.code == 0, resumed.output
    assert result_of(elsewhere) == reference
    assert (run_dir / "checkpoint-4").exists()


def test_going_back_leaves_the_later_branch(job, reference, run_dir):
    resumed = job.run(run_dir, "--resume_from_checkpoint", str(run_dir / "checkpoint-3"))
    assert resumed.code == 0, resumed.output
    assert result_of(run_dir) == reference
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]


def test_an_unknown_name_to_override_is_refused(job, run_dir):
    refused = job.run(run_dir, "--resume_from_checkpoint", "auto", "--override", "learning_rat")
    assert refused.code == 2
    assert "learning_rat" in refused.error
    assert "learning_rate" in refused.error.replace("learning_rat,", "")
