"""The tables of benchmarks/README.md are the measured ones, and every script is named there."""

from __future__ import annotations

import json
import re
import runpy

from benchmark import BENCHMARKS

PAGE = (BENCHMARKS / "README.md").read_text()
README = (BENCHMARKS.parent / "README.md").read_text()


def measured(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def table_rows(title):
    text = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_script_that_writes_a_result_is_named():
    scripts = {p.name for p in BENCHMARKS.glob("*.py") if "write_result(" in p.read_text()}
    assert set(re.findall(r"^\| `(\w+\.py)` ", PAGE, re.M)) == scripts - {"record.py"}


def test_the_tables_of_quality_and_loading_are_what_was_measured():
    losses = {
        (row["bits"], row["targets"]): f"{row['mean']:.2f} ({row['peft_mean']:.2f})"
        for row in measured("quality")["table"]
    }
    loaded = {row["bits"]: row for row in measured("loading")["table"] if row["files"] == 1}
    for number in (16, 8, 4):
        row = loaded[number]
        sizes = [f"{row[name] / 2**30:.2f} GiB" for name in ("weights", "peak_rss")]
        both = [losses[number, targets] for targets in ("auto", "all-linear")]
        assert [str(number), *both, *sizes] in table_rows("Measured")
    assert len(table_rows("Measured")) == len(losses) / 2 == 3


def test_the_table_of_speed_is_what_was_measured():
    results, expected = measured("speed"), []
    for bits in (4, 8, 16):
        for level in ("none", "full"):
            found, ours = results[f"{bits} bits"], f"ours, {level}"
            sides = (ours, "peft_guide, full", f"peft_best, {level}")
            cells = [
                f"{found[side]['tokens_per_s']:.1f}, {found[side]['steps_bytes'] / 2**30:.2f} GiB"
                for side in sides
            ]
            faster = (found["ratios"][f"tokens_per_s: {ours} / {side}"] for side in sides[1:])
            expected.append([str(bits), level, *cells, ", ".join(f"{one:.2f}" for one in faster)])
    assert table_rows("How fast, and how much memory") == expected


def test_the_table_of_modelled_steps_is_what_was_modelled():
    expected = []
    for card, one in measured("step_time")["cards"].items():
        for side, step in one["sides"].items():
            cells = [card, side, step["levels"], f"{step['step_s'] * 1e3:,.0f} ms"]
            ratios = (step["step_s"] / least for least in (peft_s(one), one["floor_s"]))
            expected.append([*cells, f"{step['tokens_per_s']:,.0f}", *map("{:.2f}".format, ratios)])
            total = sum(step["seconds"].values())
            assert abs(total - step["step_s"]) < 1e-9 * total
    marked = PAGE.partition("<!-- step_time -->")[2].partition("<!-- /step_time -->")[0]
    rows = [line.strip("| ").split(" | ") for line in marked.strip().splitlines()[2:]]
    assert [row[:7] for row in rows] == expected


def peft_s(card):
    return card["sides"]["PEFT"]["step_s"]


def test_the_table_of_kernels_is_what_was_compiled_and_in_16_bits_nothing_spills():
    rows = measured("kernels")["kernels"]
    assert {row["architecture"] for row in rows} == {75, 80, 86, 89, 90, 100, 120}
    spilled = [row for row in rows if row["spilled_bytes"]]
    assert [(row["dtype"], row["kernel"], row["spilled_bytes"]) for row in spilled] == [
        ("fp32", "norm Llama, 4096", 8)  # on sm_100, as the page says
    ]
    expected = {}
    for row in rows:
        if row["dtype"] == ("bf16" if row["architecture"] > 75 else "fp16"):
            expected.setdefault(row["kernel"], []).append(row)
    found = {cells[0]: cells[1:] for cells in table_rows("Triton kernels, compiled without a card")}
    assert found.keys() == expected.keys()
    for kernel, compiled in expected.items():
        assert found[kernel][: len(compiled)] == [str(row["registers"]) for row in compiled]
        assert found[kernel][-2] == "0"
        assert {(row["widest_load"], row["widest_store"]) for row in compiled} == {(16, 16)}


def test_the_tables_of_merge_bases_are_what_was_measured():
    cases = measured("export_bases")["cases"]
    nf4 = [case for case in cases if case["quantized"] == "nf4"]
    expected = [
        [name, *(of_form(case["forms"].get(name, {})) for case in nf4)] for name in nf4[0]["forms"]
    ]
    assert marked_rows("bases") == expected
    names = ("as trained", "dequantized, bf16", "original, bf16", "PEFT's merge")
    assert marked_rows("bases_rest") == [
        [case["model"], case["quantized"], *(of_form(case["forms"][name]) for name in names)]
        for case in cases
        if case["quantized"] != "nf4"
    ]


def of_form(form):
    """A cell: the relative error of the logits, and the loss."""
    return f"{form['logit_error']:.2%}, {form['loss']:.4f}" if "loss" in form else "-"


READERS = (
    "llama.cpp",
    "llama.cpp, the values in F32",
    "transformers",
    "transformers, rounding as llama.cpp",
)


def test_the_table_of_formats_is_what_their_readers_found():
    results, expected = measured("export_formats"), []
    for model, found in results["models"].items():
        for one in found["forms"]:
            by = one.get("readers", {}) | one.get("parts", {})
            cells = [of_reader(by[name]) if name in by else "-" for name in READERS]
            cells[0] = "refused" if "refused" in one else cells[0]
            expected.append([model, one["form"].removeprefix("--format "), *cells])
            kind = one["form"].partition("--dtype ")[2]
            if kind in results["limits"] and "gguf --dtype" in one["form"]:
                exact = by.get(READERS[1], by[READERS[0]])
                assert exact["kl"] <= results["limits"][kind], (model, kind)
                assert kind == "bf16" or by[READERS[0]]["kl"] <= results["limits"][kind]
    assert marked_rows("formats") == expected


def of_reader(found):
    """A cell: KL, and top-1 agreement."""
    return f"{found['kl']:.1e}, {found['top1_agreement']:.1%}"


def test_every_export_takes_the_memory_that_is_allowed():
    table = measured("export_memory")["table"]
    kinds = ["bf16", "fp16", "fp32"]
    both = ["none", "dequantized"]
    expected = {"hf": kinds, "hf-4bit": both, "hf-8bit": both, "gguf": [*kinds, "q8_0", "q4_0"]}
    found = [(row["format"], row.get("dtype") or row["merge_base"]) for row in table]
    assert found == [(name, kind) for name, kinds in expected.items() for kind in kinds]
    assert all(row["above_loaded"] <= row["allowed"] for row in table)
    assert marked_rows("export_memory") == [
        [*kind, *(f"{row[name] / 2**30:.2f} GiB" for name in ("written", "above_loaded"))]
        for kind, row in zip(map(list, found), table, strict=True)
    ]


def test_the_table_of_tasks_is_what_was_measured():
    result = measured("tasks")
    cells: dict[str, list[str]] = {}
    for row in result["rows"]:
        assert row.get("equal_alone", True), row  # switching changes no figure
        cell = f"{row['right']} of {row['asked']}, {row['loss']:.3f}"
        cells.setdefault(row["adapter"], []).append(cell)
    table = [[name, *row] for name, row in cells.items()]
    assert marked_rows("tasks") == table == marked_rows("tasks", README)
    assert cells.keys() == {"base", *result["trained"]}


def test_the_tables_of_switches_and_mixed_batches_are_what_was_measured():
    result = measured("switching")
    assert marked_rows("switches") == [
        [
            f"{row['linears']}, {row['modules']}",
            str(row["adapters"]),
            f"{row['ours_us']['1000']:.2f} us",
            f"{row['peft_us']['10']:,.0f} us",
        ]
        for row in result["switches"]
    ]
    assert marked_rows("mixed") == [
        [name, f"{side['step_ms']:.1f} ms", f"{side['prompt_ms']:,.0f} ms"]
        for name, side in result["tokens"]["sides"].items()
    ]


def test_the_tables_of_seven_billion_are_what_was_measured_with_what_was_asked():
    try:
        result = measured("seven_billion")
    except FileNotFoundError:
        result = {}  # not measured yet: no row says otherwise
    page = runpy.run_path(str(BENCHMARKS / "seven_parts/page.py"))
    for mark, lines in (("seven_billion", "lines"), ("seven_billion_limits", "limit_lines")):
        expected = [line.strip("| ").split(" | ") for line in page[lines](result)]
        assert marked_rows(mark) == expected
    limits = runpy.run_path(str(BENCHMARKS / "seven_parts/limits.py"))["limits"]
    for bits, steps in result.get("rows", {}).items():
        assert limits(steps, int(bits)) == result["limits"][bits]
        assert not any("failed" in row for row in steps.values())
        assert steps["kill and resume"]["equal_adapters"]


def test_the_server_held_what_it_was_tried_for():
    result = measured("serving")
    together, hostile = result["together"], result["hostile"]
    assert result["client"]["failed"] == []
    assert together["other_than_generate"] == 0
    assert together["times_as_fast"] >= together["asked_times_as_fast"]
    assert all(part["faults"] == [] and part["exit_code"] == 143 for part in hostile.values())
    assert result["leaving"]["not_freed"] == 0
    assert abs(result["leak"]["resident_grown"]) < 0.02


def marked_rows(mark, page=PAGE):
    marked = page.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]
    return [line.strip("| ").split(" | ") for line in marked.strip().splitlines()[2:]]


def test_the_table_of_clients_is_what_they_answered():
    expected = {}
    parts = sorted((BENCHMARKS / "results").glob("clients_*.json"))
    for row in (row for part in parts for row in json.loads(part.read_text())["rows"]):
        read = f"{row['format']}{row['how'] and ': '}{row['how']}"
        cells = expected.setdefault((row["client"], read, row["against"]), [])
        if "equal_text" in row:
            figures = [row["logprob"], row["kl"]] if "kl" in row else [row["given"]]
            cells.append(", ".join([str(row["equal_text"]), *(f"{one:.0e}" for one in figures)]))
        else:
            cells.append(next(iter({"refused", "failed"} & row.keys())))
    marked = PAGE.partition("<!-- clients -->")[2].partition("<!-- /clients -->")[0]
    rows = [line.strip("| ").split(" | ") for line in marked.strip().splitlines()[2:]]
    assert {tuple(row[:3]): [one for one in row[3:] if one.strip()] for row in rows} == expected
