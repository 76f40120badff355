"""Laws of several adapters on one base: each answers and is measured as it is alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from trained import save_trained, write_rows

from qlora_kit.config.base import BaseConfig
from qlora_kit.config.data import DataConfig
from qlora_kit.config.generation import AdaptersConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.run import RunConfig
from qlora_kit.options.parsed import parse_values
from qlora_kit.options.yaml_file import dump
from qlora_kit.run.adapted_base import AdaptedBase
from qlora_kit.run.named_base import Named
from qlora_kit.run.prompt_format import format_beside

Run = Callable[..., Any]
GROUPS = (BaseConfig, AdaptersConfig)
TEMPLATES = {
    "a": "{% for message in messages %}<{{ message['content'] }}>{% endfor %}:",
    "b": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
}


@pytest.fixture(scope="module")
def adapters(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two that can be together, and what cannot: one trained in 8 bits, one on other weights."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = LoRAConfig(r=2, alpha=9, target_modules="q_proj,v_proj")
    save_trained(workshop.base, folder / "b", bits=4, dtype="fp32", lora=lora, spread=0.3)
    save_trained(workshop.base, folder / "in_8_bits", bits=8, dtype="fp32")
    weights = shutil.copytree(workshop.base, folder / "other") / "model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    save_trained(folder / "other", folder / "elsewhere", bits=4, dtype="fp32")
    return {"a": workshop.adapter, **{path.name: path for path in folder.iterdir()}}


def flags_of(adapters: Mapping[str, Path], *names: str) -> list[object]:
    return [flag for name in names for flag in ("--adapter", f"{name}={adapters[name]}")]


def answers_of(run: Run, *flags: object) -> list[dict[str, Any]]:
    answer = run("generate", *flags)
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


def test_an_adapter_on_a_base_in_other_bits_is_said_to_be_another_model(
    run: Run, adapters: Mapping[str, Path]
) -> None:
    """A flag decides it for the base, and says nothing of what that does to the adapter."""
    flags = ("generate", *flags_of(adapters, "a"), "--prompt", "a", "--max_new_tokens", 1)
    for bits in (8, 16):
        said = rf"base as it is held here: a \(bits 4 and {bits}\): it answers on another model"
        with pytest.warns(UserWarning, match=said):
            run(*flags, "--bits", bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(*flags).code == run(*flags, "--bits", 8, "--allow_other_base").code == 0


def test_rows_of_a_file_are_answered_by_their_adapters_as_by_each_alone(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    model = ("--model", workshop.base, "--max_new_tokens", 9)
    prompts = ["Once", "a much longer prompt than it", "no", "Once upon"]
    alone = {}
    for name, flags in (
        ("a", ("--adapter", adapters["a"])),
        ("b", ("--adapter", adapters["b"])),
        (None, ("--bits", 4, "--dtype", "fp32")),
    ):
        path = tmp_path / "plain.jsonl"
        path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
        found = answers_of(run, *model, *flags, "--prompts", path)
        assert all(row.keys() == {"prompt", "answer"} for row in found)
        alone[name] = [row["answer"] for row in found]
    assert len({str(one) for one in alone.values()}) == 3
    rows = [
        {"prompt": prompt, "adapter": name, "id": index}
        for index, prompt in enumerate(prompts)
        for name in ("b", None, "a")
    ]
    unnamed = {"prompt": prompts[0], "id": 0}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, unnamed)))
    flags = (*model, *flags_of(adapters, "a", "b"), "--prompts", path, "--use", "b")
    for size in (1, 5):
        found = answers_of(run, *flags, "--batch_size", size)
        assert found == [
            {**row, "answer": alone[row["adapter"]][row["id"]]}
            for row in (*rows, {**unnamed, "adapter": "b"})
        ]


def test_of_several_adapters_one_answers_a_prompt(
    run: Run, workshop: Any, adapters: Mapping[str, Path]
) -> None:
    flags = ("--model", workshop.base, "--max_new_tokens", 9, "--prompt", "Once")
    together = (*flags, *flags_of(adapters, "a", "b"))
    for use, alone in (
        ("a", ("--adapter", adapters["a"])),
        ("b", ("--adapter", adapters["b"])),
        ("base", ("--bits", 4, "--dtype", "fp32")),
    ):
        assert run("generate", *together, "--use", use).out == run("generate", *flags, *alone).out


def test_an_adapter_that_is_not_there_is_refused(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    both = flags_of(adapters, "a", "b")
    for flags, row, code, words in (
        (both, None, 2, "2 adapters are given, and nothing says which one answers; give --use"),
        ([*both, "--use", "c"], None, 2, "use c: no adapter has this name; name one of a, b"),
        (["--use", "a"], None, 2, "use a: no adapter has this name; give it as --adapter"),
        (both, {}, 3, "rows.jsonl:2: names no adapter, and several are given; give every row"),
        (both, {"adapter": "c"}, 3, 'rows.jsonl:2: "adapter" is c, and no adapter has this'),
        (both, {"adapter": 1}, 3, 'rows.jsonl:2: "adapter" is 1, and no adapter has this'),
        ([*both, "--use", "c"], {"adapter": "a"}, 2, "use c: no adapter has this name"),
        (["--adapter", "keys=x", *both], {"adapter": "a"}, 3, "x: no such directory"),
    ):
        prompt: tuple[object, ...] = ("--prompt", "x")
        if row is not None:
            rows = [{"prompt": "x", "adapter": "base"}, {"prompt": "x", **row}]
            path.write_text("\n".join(map(json.dumps, rows)))
            prompt = ("--prompts", path)
        answer = run("generate", "--model", workshop.base, *flags, *prompt)
        assert (answer.code, answer.out) == (code, "")
        assert words in answer.line


def test_adapters_of_different_bases_are_refused_and_both_are_named(
    run: Run, workshop: Any, adapters: Mapping[str, Path]
) -> None:
    flags = ("generate", "--prompt", "Once", "--max_new_tokens", 3, "--use", "a")
    eight = (*flags, *flags_of(adapters, "a", "in_8_bits"))
    answer = run(*eight)
    assert answer.code == 3
    assert "adapter and " in answer.line
    assert "in_8_bits were not trained on one base: bits 4 and 8; leave one out" in answer.line
    assert run(*eight, "--bits", 4).out == run(*eight, "--allow_other_base").out != ""
    other = (*flags, *flags_of(adapters, "a", "elsewhere"))
    for more in ((), ("--model", workshop.base)):
        answer = run(*other, *more)
        assert answer.code == 3
        assert "the weights are those of base and of other; leave one out" in answer.line
    assert run(*other, "--allow_other_base").out == run(*eight, "--bits", 4).out


def test_of_adapters_that_name_a_base_and_say_no_more_the_names_are_compared(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """As PEFT's files do."""
    peft = shutil.copytree(adapters["b"], tmp_path / "peft")
    weights, config = peft / "adapter_model.safetensors", peft / "adapter_config.json"
    save_file(load_file(weights), weights, {"format": "pt"})
    flags = ("generate", "--prompt", "Once", "--max_new_tokens", 3, "--use", "peft")
    both = (*flags, *flags_of({**adapters, "peft": peft}, "peft", "a"))
    assert run(*both).code == 0
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "base_model_name_or_path": "some/other"}))
    answer = run(*both)
    assert answer.code == 3
    assert (
        f"they name some/other and {said['base_model_name_or_path']}; leave one out" in answer.err
    )
    assert run(*both, "--model", workshop.base).code == 0


def test_a_prompt_is_written_for_the_adapter_that_answers_it(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """Each has a template of its own, and one of them stops where the other goes on."""
    own = {name: tmp_path / name for name in TEMPLATES}
    for name, template in TEMPLATES.items():
        shutil.copytree(adapters[name], own[name])
        (own[name] / "chat_template.jinja").write_text(template)
    flags = ("--model", workshop.base, "--chat", "--max_new_tokens", 9, "--prompt", "Once")
    alone = {name: run("generate", *flags, "--adapter", own[name]).out for name in own}
    assert alone["a"] != alone["b"]
    together = (*flags, *flags_of(own, "a", "b"))
    assert {name: run("generate", *together, "--use", name).out for name in own} == alone
    # The base alone has no template, and is asked as the first adapter is.
    assert run("generate", *together, "--use", "base").code == 0
    every = list(range(3, 256))
    (own["b"] / "generation_config.json").write_text(json.dumps({"eos_token_id": every}))
    assert run("generate", *together, "--use", "a").out == alone["a"]
    assert run("generate", *together, "--use", "b").out == "\n"


def test_an_adapter_that_comes_later_is_written_for_as_one_that_was_there(
    workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """The base borrows the first one's template; nothing else, and nothing for those after it."""
    own = {name: tmp_path / name for name in TEMPLATES}
    for name, directory in own.items():
        shutil.copytree(adapters[name], directory)
    (own["a"] / "chat_template.jinja").write_text(TEMPLATES["a"])
    (own["a"] / "config.yaml").write_text("literal_control_tokens: true\n")
    (own["a"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8, 9]}))
    parsed = parse_values({"model": str(workshop.base)}, GROUPS)
    named = Named.open(parsed, {name: str(directory) for name, directory in own.items()})
    formats = AdaptedBase.open(named).formats
    later = format_beside(formats[None], named.adapters["b"])
    base, first, there = formats[None], formats["a"], formats["b"]
    assert later.tokenizer.chat_template == there.tokenizer.chat_template is None
    assert later.ends == there.ends == base.ends
    assert base.tokenizer.chat_template == first.tokenizer.chat_template == TEMPLATES["a"]
    assert {7, 8, 9} <= first.ends - base.ends
    text = base.tokenizer.eos_token
    assert base.prompt_ids(text) == there.prompt_ids(text) != first.prompt_ids(text)


def test_several_adapters_are_measured_as_each_alone(
    run: Run, workshop: Any, adapters: Mapping[str, Path]
) -> None:
    flags = ("--model", workshop.base, "--data", workshop.rows, "--max_new_tokens", 4)
    flags = (*flags, "--generate", 1)

    def reports(*more: object) -> Any:
        answer = run("evaluate", *flags, "--json", *more)
        assert (answer.code, answer.err) == (0, "")
        return json.loads(answer.out)

    alone = [
        reports("--bits", 4, "--dtype", "fp32"),
        {**reports("--adapter", adapters["a"]), "adapter": "a"},
        reports("--adapter", f"b={adapters['b']}"),
    ]
    assert len({one["loss"] for one in alone}) == 3
    both = flags_of(adapters, "a", "b")
    assert reports(*both) == alone
    shown = run("evaluate", *flags, *both).out
    for report, name in zip(alone, ("base", "a", "b"), strict=True):
        exact = f"{report['right']} of {report['asked']} ({report['exact_match']:.1%})"
        cells = f"{report['loss']:.4f}", f"{report['perplexity']:,.3f}", exact
        row = next(line for line in reversed(shown.splitlines()) if line.strip().startswith(name))
        assert [cell.strip() for cell in row.split("│")] == [name, *cells]
        assert f"  {name} " in shown


def test_chats_are_measured_as_the_run_of_each_adapter_wrote_them(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """The prompt of an exact match is the one that `generate` answers; a given option decides."""
    template = (
        "{% for m in messages %}{{ '<' + (mood | default('calm')) + '>' + m['content'] }}"
        "{{ '\\n' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    own = {name: shutil.copytree(adapters[name], tmp_path / name) for name in ("a", "b")}
    for name, path in own.items():
        (path / "chat_template.jinja").write_text(template)
        (path / "config.yaml").write_text(f"chat_template_args: mood={name}\n")
    said = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon"}]
    rows = tmp_path / "chats.jsonl"
    rows.write_text(json.dumps({"messages": said}) + "\n")
    flags = ("--model", workshop.base, "--data", rows, "--generate", 1, "--max_new_tokens", 3)

    def asked(*more: object) -> list[str]:
        answer = run("evaluate", "--json", *flags, *flags_of(own, "a", "b"), *more)
        assert answer.code == 0, answer.err
        return [one["answers"][0]["prompt"] for one in json.loads(answer.out)]

    # The base writes in the first adapter's template, as generate has it.
    assert asked() == [f"<{name}>Once\n" for name in "aab"]
    assert asked("--chat_template_args", "mood=odd") == ["<odd>Once\n"] * 3
    assert asked("--chat_template", own["a"]) == ["<calm>Once\n"] * 3


def test_adapters_of_different_data_need_rows_to_be_measured_on(
    run: Run, workshop: Any, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    own = {name: tmp_path / name for name in ("a", "b")}
    for name, path in own.items():
        shutil.copytree(adapters[name], path)
        rows = write_rows(tmp_path / f"{name}.jsonl", 20)
        data = RunConfig(data=DataConfig(data=str(rows), eval_fraction=0.2))
        (path / "config.yaml").write_text(dump(data.as_flat()))
    answer = run("evaluate", *flags_of(own, "a", "b"), "--no_exact_match")
    assert answer.code == 2
    assert "2 adapters are given, and their runs held out different rows" in answer.line
