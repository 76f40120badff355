"""The README is true: its example runs, its tables are the measured ones, its tree is the tree."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", ["README.md", "docs/training-by-hand.md"])
def test_the_python_examples_train_save_and_export(tmp_path, name, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line and not line.startswith(" ")]) <= 12
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})
    said = capsys.readouterr().out
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert last < first
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_speed_table_is_what_was_measured():
    measured = json.loads((RESULTS / "speed.json").read_text())
    rows = table_rows(re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", README, re.S)[1])
    assert [(bits, level) for bits, level, *_ in rows] == [
        (bits, level) for bits in ("4", "8", "16") for level in ("none", "full")
    ]
    for bits, level, *cells, times in rows:
        found, ours = measured[f"{bits} bits"], f"ours, {level}"
        sides = (ours, "peft_guide, full", f"peft_best, {level}")
        assert cells == [
            f"{found[side]['tokens_per_s']:.1f}, {found[side]['steps_bytes'] / 2**30:.2f} GiB"
            for side in sides
        ]
        faster = (found["ratios"][f"tokens_per_s: {ours} / {side}"] for side in sides[1:])
        assert times == ", ".join(f"{one:.2f}" for one in faster)


def test_the_table_of_merge_bases_is_what_was_measured():
    rows = table_rows(re.search(r"<!-- bases -->\n(.*?)<!-- /bases -->", README, re.S)[1])
    cases = json.loads((RESULTS / "export_bases.json").read_text())["cases"]
    measured = {case["model"]: case["forms"] for case in cases if case["quantized"] == "nf4"}
    assert [model for model, *_ in rows] == [*measured]
    times = []
    for model, *cells in rows:
        names = ("as trained", "dequantized, bf16", "original, bf16", "PEFT's merge")
        forms = [measured[model][name] for name in names]
        assert cells == [f"{form['logit_error']:.1%}, {form['loss']:.3f}" for form in forms]
        times.append(forms[3]["logit_error"] / forms[1]["logit_error"])
    low, high = re.search(r"(\d+) to (\d+) times as near as PEFT's merge", README).groups()
    assert (int(low), int(high)) == (int(min(times)), int(max(times)))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_two_lines_make_their_own_environment():
    lines = re.findall(r"^ {4}(python3 -m venv .*)$", README, re.M)
    assert len(lines) == 2
    assert all("-c constraints.txt" in line for line in lines)
    assert lines[0].endswith("scripts/finetune.py")
    assert lines[1].endswith("-m pytest")


def test_the_tree_names_every_module_and_nothing_else():
    design = (ROOT / "docs" / "design.md").read_text()
    tree = re.search(r"```\nqlora_kit/\n(.*?)```", design, re.S)[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        entry = re.match(r"^( +)([\w.]+/?)", line)
        if not entry:
            continue
        depth, name = len(entry[1]), entry[2]
        if depth == 2:
            folder = name if name.endswith("/") else ""
        if name.endswith(".py"):
            named.add((folder if depth > 2 else "") + name)
    package = ROOT / "qlora_kit"
    there = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


@functools.cache
def help_of(command):
    """What the script of a command says with `--help`."""
    script = f"scripts/{command.replace('-', '_')}.py"
    run = [sys.executable, script, "--help"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("line", re.findall(r"^ {4}qlora-kit (.*)$", README, re.M))
def test_every_command_line_uses_flags_that_exist(line):
    command, *rest = line.split()
    for flag in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{flag}\b", help_of(command)), flag
