"""Laws of `qlora-kit export`: what it writes, what it says of it, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import edit_weights, save_checkpoint, tree_hash
from safetensors.torch import load_file
from trained import save_peft, save_trained, write_rows
from transformers import AutoModelForCausalLM

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import with_room
from qlora_kit.files.lock import locked
from qlora_kit.options.yaml_file import dump

Run = Callable[..., Any]


def exported(run: Run, workshop: Any, target: Path, *more: object) -> dict[str, Any]:
    """The export.json of a run of the command that went well."""
    with warnings.catch_warnings(record=True) as said:
        answer = run(
            "export", "--adapter", workshop.adapter, "--model", workshop.base, "--output_dir",
            target, "--verify", workshop.rows, *more,
        )  # fmt: skip
    assert (answer.code, answer.err) == (0, "")
    report = json.loads((target / "export.json").read_text())
    # A model that was not trained is not said to be verified.
    far = report["kl"] > 1e-2
    ((reader, read),) = report["readers"].items()
    how = f", {read['read']}," if reader == "qlora_kit" else ""
    word = "compared" if far else "verified"
    assert f"{word}   by {reader}{how} on {report['tokens']} tokens of rows.jsonl: " in answer.out
    assert f"tokenizer equal on all {read['texts']} texts" in answer.out
    assert any("the export is another model than" in str(one.message) for one in said) == far
    assert f"KL {report['kl']:.2e}" in answer.out
    return dict(report)


def test_it_writes_a_model_and_says_how_far_it_is(run: Run, workshop: Any, tmp_path: Path) -> None:
    report = exported(run, workshop, tmp_path / "out")
    assert report["kl"] <= 1e-6  # run and export are fp32: only the order of sums differs
    assert report["top1_agreement"] == 1
    assert report["max_logit_difference"] <= 1e-3
    assert report["tokens"] > 100
    assert report["dtype"] == "fp32"  # auto: the run's own, whatever this machine prefers
    assert report["merge_base"] == "dequantized"
    assert report["verified_on"] == "rows.jsonl"
    assert report["adapter"] == "adapter"
    assert report["base"]["bits"] == 4
    assert report["versions"].keys() >= {"torch", "transformers", "bitsandbytes"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32


def test_a_model_that_fits_in_4_bits_only_is_verified_layer_by_layer(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    """The device has room for what was trained and not for the export beside it."""
    expected = exported(run, workshop, tmp_path / "whole")
    assert expected["export_read"] == "whole, on the host"
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    with with_room(size // 2):
        report = exported(run, workshop, tmp_path / "out")
    (name, whole), (other, layers) = *expected["readers"].items(), *report["readers"].items()
    assert (name, other) == ("transformers", "qlora_kit")
    assert layers == whole | {"read": "layer by layer, on the host"}
    said = {"export_read": "layer by layer, on the host", "readers": report["readers"]}
    assert report == expected | said
    written, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(written[name], tensor) for name, tensor in whole.items())


def test_other_merges_are_measured_as_what_they_are(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    exact = exported(run, workshop, tmp_path / "exact")
    rounded = exported(run, workshop, tmp_path / "bf16", "--dtype", "bf16")
    original = exported(run, workshop, tmp_path / "original", "--merge_base", "original")
    assert rounded["dtype"] == "bf16"
    assert exact["kl"] < rounded["kl"] < original["kl"]
    assert original["kl"] > 1e-2
    assert load_file(tmp_path / "bf16" / "model.safetensors")["lm_head.weight"].dtype == (
        torch.bfloat16
    )


def test_shards_are_written_and_read_back(run: Run, workshop: Any, tmp_path: Path) -> None:
    # The smallest size is a MiB, so the base must be larger.
    save_checkpoint(tmp_path / "base", "llama2", intermediate_size=1500)
    save_trained(tmp_path / "base", tmp_path / "adapter", bits=8, dtype="fp32")
    answer = run(
        "export", "--adapter", tmp_path / "adapter", "--model", tmp_path / "base",
        "--output_dir", tmp_path / "out", "--verify", workshop.rows, "--shard_size", 2**20,
    )  # fmt: skip
    assert answer.code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_the_base_in_4_bits_is_exact_and_its_merge_is_not(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    report = exported(run, workshop, tmp_path / "out", "--format", "hf-4bit")
    assert (report["format"], report["merge_base"]) == ("hf-4bit", "none")
    assert report["kl"] <= 1e-6
    assert 'subfolder="adapter"' in (tmp_path / "out" / "README.md").read_text()
    assert "multiplies wrongly on CPUs" in " ".join(report["notes"])  # it has rows of 173
    again = run(
        "generate", "--adapter", tmp_path / "out" / "adapter", "--prompt", "a", "--max_new_tokens",
        1, "--dtype", "fp32",
    )  # fmt: skip
    assert again.code == 0
    answer = run(
        "export", "--adapter", workshop.adapter, "--model", workshop.base, "--output_dir",
        tmp_path / "merged", "--verify", workshop.rows, "--format", "hf-4bit", "--merge_base",
        "dequantized", "--max_kl", 1e-3,
    )  # fmt: skip
    assert answer.code == 5
    assert "--merge_base none" in answer.line
    assert not (tmp_path / "merged").exists()


def test_a_divergence_above_max_kl_is_an_error_and_leaves_nothing(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    before = tree_hash(tmp_path)
    answer = run(
        "export", "--adapter", workshop.adapter, "--model", workshop.base, "--output_dir",
        tmp_path / "out", "--overwrite", "--verify", workshop.rows, "--merge_base", "original",
        "--max_kl", "1e-3",
    )  # fmt: skip
    assert answer.code == 5
    assert "above --max_kl 0.001; nothing was written" in answer.line
    assert tree_hash(tmp_path) == before
    exported(run, workshop, tmp_path / "good", "--max_kl", "1e-3")


def test_an_old_export_is_replaced_whole(run: Run, workshop: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("stale")
    (tmp_path / "out" / "export.json").write_text('{"merge_base": "original", "dtype": "bf16"}')
    answer = run(
        "export", "--adapter", workshop.adapter, "--model", workshop.base,
        "--output_dir", tmp_path / "out", "--verify", workshop.rows,
    )  # fmt: skip
    assert answer.code == 2
    assert "is not empty" in answer.line
    exported(run, workshop, tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("place", ["adapter", "adapter/out", "base", "base/out", ".", "data"])
def test_an_output_over_what_is_read_is_refused(
    run: Run, workshop: Any, tmp_path: Path, place: str
) -> None:
    shutil.copytree(workshop.base, tmp_path / "base")
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    (tmp_path / "data").mkdir()
    shutil.copy(workshop.rows, tmp_path / "data" / "rows.jsonl")
    before = tree_hash(tmp_path)
    answer = run(
        "export", "--adapter", tmp_path / "adapter", "--model", tmp_path / "base", "--output_dir",
        tmp_path / place, "--overwrite", "--verify", tmp_path / "data" / "rows.jsonl",
    )  # fmt: skip
    assert answer.code == 2
    assert "--output_dir" in answer.line
    assert "overlaps with" in answer.line
    assert tree_hash(tmp_path) == before


def test_flags_may_not_contradict_what_the_adapter_says(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    for flags, words in (
        (["--bits", "8"], "--bits 8 is given, and {} was trained with bits 4; leave --bits out"),
        (["--quant_type", "fp4"], "--quant_type fp4 is given, and {} was trained with"),
        (["--no_double_quant"], "--double_quant False is given, and {} was trained with"),
    ):
        answer = run(
            "export", "--adapter", workshop.adapter, "--model", workshop.base,
            "--output_dir", tmp_path / "out", *flags,
        )  # fmt: skip
        assert answer.code == 2
        assert words.format(workshop.adapter)[:60] in answer.line
    exported(run, workshop, tmp_path / "out", "--bits", "4", "--quant_type", "nf4")


def test_it_needs_an_adapter_and_a_place(run: Run, workshop: Any, tmp_path: Path) -> None:
    assert "--output_dir not given" in run("export", "--adapter", workshop.adapter).line
    assert "--adapter not given" in run("export", "--output_dir", tmp_path / "out").line
    assert run("export").code == 2


def test_the_adapter_names_its_base_and_its_held_out_rows(
    run: Run, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workshop.base, tmp_path / "base")
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    write_rows(tmp_path / "rows.jsonl", 40)
    config = RunConfig(
        base=BaseConfig(model="./base", dtype="fp32"),
        data=DataConfig(data="rows.jsonl", eval_fraction=0.1),
        training=TrainingConfig(seed=3),
    )
    (tmp_path / "adapter" / "config.yaml").write_text(dump(config.as_flat()))
    described = tmp_path / "adapter" / "adapter_config.json"
    for_peft = json.loads(described.read_text())
    described.write_text(json.dumps({**for_peft, "base_model_name_or_path": "./base"}))
    monkeypatch.chdir(tmp_path)
    assert run("export", "--adapter", "adapter", "--output_dir", "out").code == 0
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["verified_on"] == "10 % of rows.jsonl, drawn by seed 3"
    # Where the rows are no longer there, the sample serves, and that is said.
    (tmp_path / "rows.jsonl").unlink()
    answer = run("export", "--adapter", "adapter", "--output_dir", "again")
    assert answer.code == 0
    assert "cannot be read, so the sample is: rows.jsonl: no such file" in answer.out
    assert "sample:" in json.loads((tmp_path / "again" / "export.json").read_text())["verified_on"]
    # A base that is gone is not looked for on the hub.
    shutil.move("base", "moved")
    answer = run("export", "--adapter", "adapter", "--output_dir", "third")
    assert answer.code == 3
    assert "adapter belongs to the base ./base, which is not here; give" in answer.line
    # Nor is a name that nobody knows taken for one that was given.
    described.write_text(json.dumps({**for_peft, "base_model_name_or_path": "pnain"}))
    config = tmp_path / "adapter" / "config.yaml"
    config.write_text(config.read_text().replace("model: ./base", "model: pnain"))
    answer = run("export", "--adapter", "adapter", "--output_dir", "third")
    assert answer.code == 3
    assert "adapter belongs to the base pnain, which is not here; give" in answer.line


def test_a_config_of_the_adapter_that_was_broken_is_named(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "config.yaml").write_text("bits: 4\nlora_rr: 3\n")
    before = tree_hash(tmp_path)
    answer = run(
        "export", "--adapter", tmp_path / "adapter", "--model", workshop.base,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert answer.code == 3
    assert "config.yaml:2: unknown key lora_rr" in answer.line
    assert tree_hash(tmp_path) == before


def test_another_base_needs_a_word(run: Run, workshop: Any, tmp_path: Path) -> None:
    shutil.copytree(workshop.base, tmp_path / "base")
    edit_weights(tmp_path / "base", lambda tensors: tensors["lm_head.weight"].neg_())
    before = tree_hash(tmp_path)
    command = (
        "export", "--adapter", workshop.adapter, "--model", tmp_path / "base",
        "--output_dir", tmp_path / "out", "--verify", workshop.rows,
    )  # fmt: skip
    answer = run(*command)
    assert answer.code == 3
    assert "--allow_other_base" in answer.line
    assert tree_hash(tmp_path) == before
    assert run(*command, "--allow_other_base").code == 0


def test_an_adapter_of_peft_is_exported_in_the_bits_that_are_given(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    model = save_peft(workshop.base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    answer = run(
        "export", "--adapter", tmp_path / "adapter", "--bits", "16", "--output_dir",
        tmp_path / "out", "--verify", workshop.rows, "--dtype", "fp32",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    merged = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    # The base is held in this machine's compute dtype; it was saved in bf16, which fp32 holds too.
    torch.testing.assert_close(found[key], merged[key].float(), rtol=1e-6, atol=1e-6)
    assert report["base"]["bits"] == 16


@pytest.mark.parametrize(
    "damage",
    ["gone", "a directory", "not text", "no rows", "a pipe", "a loop", "other columns", "nobody's"],
)
def test_whatever_is_wrong_with_the_data_of_the_run_the_sample_serves(
    run: Run, workshop: Any, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(workshop.adapter, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    more = ""
    if damage == "a directory":
        rows.mkdir()
    elif damage == "not text":
        rows.write_bytes(b"\xff\xfe\x00")
    elif damage == "no rows":
        rows.write_text("\n")
    elif damage == "a pipe":
        os.mkfifo(rows)
    elif damage == "a loop":
        rows.symlink_to(rows)
    elif damage == "other columns":
        write_rows(rows, 40)
        more = "columns: x=prompt\n"
    name = "~surely_nobody/rows.jsonl" if damage == "nobody's" else str(rows)
    (tmp_path / "adapter" / "config.yaml").write_text(
        f"model: {workshop.base}\ndata: {name}\neval_fraction: 0.1\nbits: 4\n{more}"
    )
    answer = run(
        "export", "--adapter", tmp_path / "adapter", "--model", workshop.base,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "note: the run's held-out rows cannot be read, so the sample is: " in answer.out
    assert "sample:" in json.loads((tmp_path / "out" / "export.json").read_text())["verified_on"]


def test_an_adapter_alone_names_its_base_for_others(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    adapter = shutil.copytree(workshop.adapter, tmp_path / "adapter")
    (adapter / "config.yaml").write_text(f"model: {workshop.base}\nbits: 4\n")
    card = "---\nbase_model: base\nlibrary_name: peft\n---\n# For `base`\n"
    (adapter / "README.md").write_text(card)
    command = ("export", "--adapter", adapter, "--format", "adapter")
    answer = run(*command, "--output_dir", tmp_path / "plain")
    assert (answer.code, answer.err) == (0, "")
    assert "named by a path of this machine" in answer.out
    answer = run(*command, "--output_dir", tmp_path / "out", "--base_name", "owner/name")
    assert (answer.code, answer.err) == (0, "")
    assert "note" not in answer.out
    assert "vllm serve owner/name --enable-lora --max-lora-rank 8 --lora-modules" in answer.out
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert described == {**before, "base_model_name_or_path": "owner/name", "revision": None}
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    assert (tmp_path / "out" / "README.md").read_text() == card.replace(
        "base_model: base", 'base_model: "owner/name"'
    ).replace("`base`", "`owner/name`")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    flags = ("--model", workshop.base, "--prompt", "Once", "--max_new_tokens", 5)
    texts = [
        run("generate", "--adapter", place, *flags).out for place in (adapter, tmp_path / "out")
    ]
    assert texts[0] == texts[1] != "\n"
    # It may be replaced by another, and merging is another thing.
    more = ("--output_dir", tmp_path / "out", "--overwrite")
    assert run(*command, *more).code == 0
    assert "max_kl 1.0 goes with format hf" in run(*command, *more, "--max_kl", 1).line


def test_a_path_is_said_not_to_be_portable(run: Run, workshop: Any, tmp_path: Path) -> None:
    command = (
        "export", "--adapter", workshop.adapter, "--model", workshop.base, "--verify",
        workshop.rows, "--output_dir",
    )  # fmt: skip
    answer = run(*command, tmp_path / "out")
    assert f"named by a path of this machine, {workshop.base}" in answer.out
    answer = run(*command, tmp_path / "named", "--base_name", "owner/name")
    assert "path of this machine" not in answer.out
    report = json.loads((tmp_path / "named" / "export.json").read_text())
    assert report["base"]["name"] == "owner/name"


def test_an_export_goes_into_a_volume(run: Run, workshop: Any, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(tmp_path / "volume")
    if libc.mount(b"tmpfs", target, b"tmpfs", 0, b"size=8m"):
        pytest.skip(f"no mount: {os.strerror(ctypes.get_errno())}")
    try:
        exported(run, workshop, tmp_path / "volume")
        exported(run, workshop, tmp_path / "volume", "--overwrite", "--dtype", "bf16")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "volume").dtype == torch.bfloat16
        assert not [name for name in os.listdir(tmp_path / "volume") if name.startswith(".")]
        # A volume that is too small is said before the weights are read.
        libc.umount2(target, 2)
        libc.mount(b"tmpfs", target, b"tmpfs", 0, b"size=64k")
        answer = run(
            "export", "--adapter", workshop.adapter, "--model", workshop.base,
            "--output_dir", tmp_path / "volume",
        )  # fmt: skip
        assert answer.code == 4
        assert "the export needs" in answer.line
    finally:
        libc.umount2(target, 2)


def test_an_export_into_a_directory_in_use_is_refused(
    run: Run, workshop: Any, tmp_path: Path
) -> None:
    exported(run, workshop, tmp_path / "out")
    before = tree_hash(tmp_path)
    with locked(tmp_path / "out"):
        answer = run(
            "export", "--adapter", workshop.adapter, "--model", workshop.base,
            "--output_dir", tmp_path / "out", "--overwrite",
        )  # fmt: skip
    assert answer.code == 4
    assert f"in use by process {os.getpid()}; wait until it ends" in answer.line
    assert tree_hash(tmp_path) == before
