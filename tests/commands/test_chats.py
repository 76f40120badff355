"""Laws of chats over whole commands: where answers stop, which template is kept, on which day."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import chat_tokenizer
from families import tiny_model
from transformers import AutoTokenizer

from qlora_kit.base.load import load_base
from qlora_kit.data import chat_template as sandbox
from qlora_kit.data.chat_template import read_templates, take_template
from qlora_kit.data.encode import encode, prompt_ids
from qlora_kit.data.rows import Row
from qlora_kit.generation.decode import end_ids
from qlora_kit.run.saved_adapter import SavedAdapter

Run = Callable[..., Any]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML
SHORT = ("--bits", 16, "--max_steps", 1, "--eval_fraction", 0, "--gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose EOS is a document's end: `<|im_end|>` ends nothing that it says."""
    directory = tmp_path_factory.mktemp("chats") / "base"
    tokenizer = chat_tokenizer()
    tiny_model("llama2", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id, "top_k": 7}))
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "rows.jsonl"
    chat = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat}) + "\n")
    return path


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """What the clock says."""

    def set_day(text: str) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls.fromisoformat(text)

        monkeypatch.setattr(sandbox, "datetime", Clock)

    return set_day


@pytest.mark.parametrize("name", ["chatml", "llama-3", "plain"])
def test_the_end_of_a_turn_stops_generation_of_adapter_and_export(
    run: Run, base: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    flags = ("--model", base, "--data", rows, "--chat_template", name)
    shown = run("finetune", *flags, *SHORT, "--output_dir", adapter)
    assert shown.code == 0, shown.err
    assert run("export", "--adapter", adapter, "--output_dir", merged).code == 0
    tokenizer = AutoTokenizer.from_pretrained(merged)
    (row,) = encode(Row(json.loads(rows.read_text().splitlines()[0]), "rows", 1), tokenizer, 99)
    assert isinstance(row.labels, list)
    end = [label for label in row.labels if label != -100][-1]
    assert f"turns end with '{tokenizer.decode([end])}'" in shown.out
    for directory in (adapter, merged):
        settings = json.loads((directory / "generation_config.json").read_text())
        stops = settings["eos_token_id"]
        assert end in (stops if isinstance(stops, list) else [stops])
        assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
        assert settings["top_k"] == 7
    # Also of the base alone, once it has the template.
    bare = load_base(str(base), bits=16)
    take_template(bare.tokenizer, adapter)
    assert end in end_ids(bare.model, bare.tokenizer)


def test_named_templates_survive_saving_and_exporting(
    run: Run, base: Path, rows: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}" + CHATML}
    named = tmp_path / "named"
    tiny_model("llama2", vocab_size=len(tokenizer)).save_pretrained(named)
    tokenizer.save_pretrained(named)
    assert (named / "additional_chat_templates" / "tool_use.jinja").exists()
    for flags, kept in (
        ((), {"default", "tool_use"}),
        (("--chat_template", "tool_use"), {"default"}),
        (("--chat_template", "chatml"), {"default"}),
    ):
        adapter, merged = tmp_path / f"a{flags[1:]}", tmp_path / f"m{flags[1:]}"
        given = ("--model", named, "--data", rows, *flags)
        answer = run("finetune", *given, *SHORT, "--output_dir", adapter)
        assert answer.code == 0, answer.err
        assert run("export", "--adapter", adapter, "--output_dir", merged).code == 0
        for directory in (adapter, merged):
            texts = read_templates(directory)
            assert texts.keys() == kept
            assert ("{{ tools }}" in texts["default"]) == ("tool_use" in flags)
            read = AutoTokenizer.from_pretrained(directory).chat_template
            assert read == (texts if len(texts) > 1 else texts["default"])


def test_a_run_has_one_day(
    run: Run, base: Path, rows: Path, tmp_path: Path, day: Callable[[str], None]
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    flags = ("--model", base, "--data", rows, "--chat_template", template)
    cache = ("--token_cache", tmp_path / "cache")
    first = tmp_path / "first"
    day("2026-01-01")
    saving = (*SHORT[:2], "--max_steps", 2, *SHORT[4:], "--save_steps", 1, *cache)
    answer = run("finetune", *flags, *saving, "--output_dir", first)
    assert answer.code == 0, answer.err
    assert "written on 2026-01-01" in answer.out
    assert "chat_date: '2026-01-01'" in (first / "config.yaml").read_text()
    day("2026-06-30")
    # The cache does not give the tokens of another day, and the day shown is the one trained on.
    shown = run("show-data", *flags, *cache, "--eval_fraction", 0)
    assert "30 June 2026" in shown.out
    assert "01 January" not in shown.out
    given = run("show-data", *flags, *cache, "--eval_fraction", 0, "--chat_date", "2026-01-01")
    assert "01 January 2026" in given.out
    # A checkpoint of January goes on in June, in January.
    onward = (*saving[:2], "--max_steps", 3, *saving[4:])
    checkpoint = first / "checkpoint-1"
    second = tmp_path / "second"
    resumed = run(
        *("finetune", *flags, *onward, "--output_dir", second),
        *("--resume_from_checkpoint", checkpoint, "--override", "max_steps"),
    )
    assert resumed.code == 0, resumed.err
    assert "written on 2026-01-01" in resumed.out
    # What generate is handed is what the run was trained behind.
    tokenizer = AutoTokenizer.from_pretrained(second)
    ids = prompt_ids("he", tokenizer, chat=True, options=SavedAdapter.open(str(second)).chat())
    assert "01 January 2026" in tokenizer.decode(ids)
    other = ("--chat_date", "2026-06-30", "--resume_from_checkpoint", checkpoint)
    refused = run("finetune", *flags, *onward, "--output_dir", tmp_path / "third", *other)
    assert refused.code == 2
    assert "chat_date: 2026-01-01 there, 2026-06-30 here" in refused.line


THINKS = CHATML.replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if not thinks | default(true) %}{{ '<none>' }}{% endif %}{% endif %}",
)


def test_variables_reach_the_template_and_are_kept(
    run: Run, base: Path, rows: Path, tmp_path: Path
) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text("{{ note | default('') }}" + THINKS)
    flags = ("--model", base, "--data", rows, "--chat_template", template)
    args = ("--chat_template_args", "note=hear ye,thinks=true")
    shown = run("show-data", *flags, *args, "--eval_fraction", 0)
    assert "hear ye<|im_start|>user" in shown.out
    adapter = tmp_path / "adapter"
    assert run("finetune", *flags, *args, *SHORT, "--output_dir", adapter).code == 0
    said = SavedAdapter.open(str(adapter)).chat()
    assert dict(said.variables) == {
        "note": "hear ye",
        "thinks": True,
    }
    refused = run("show-data", *flags, "--chat_template_args", "think=false")
    assert refused.code == 2
    assert "think: the chat template has no such variable; leave it out, or give one of " in (
        refused.line
    )
    assert "note, thinks" in refused.line
    dated = run("show-data", *flags, "--chat_date", "2026-01-01")
    assert "the chat template asks for no date; leave it out" in dated.line
