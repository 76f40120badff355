"""show-data shows what the loop gets: on the terminal, as JSON and as a page."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from chat_tokenizer import chat_tokenizer
from families import tree_hash

from qlora_kit.commands.show_data import HEAD, main
from qlora_kit.data import report as data_report
from qlora_kit.data.batch import collate_packs, padding_id
from qlora_kit.data.encode import encode_rows
from qlora_kit.data.order import make_packs
from qlora_kit.data.rows import read_rows
from qlora_kit.data.schedule import StepSchedule
from qlora_kit.errors import ERROR_LINE_LIMIT

CHATS = [
    [("user", "he <b> & 'x'"), ("assistant", "hello"), ("user", "q"), ("assistant", "on\n🙂")],
    [("user", "spell </s> it"), ("assistant", "it is </s>")],
    [("user", "nobody answers")],
    [("user", "h"), ("assistant", "yes"), ("user", "long " * 60), ("assistant", "never seen")],
    [("user", "h" * 400), ("assistant", "no")],
    [("user", "spell </s> it"), ("assistant", "it is </s>")],
    [("user", "a"), ("assistant", "b")],
    [("user", "c"), ("assistant", "d")],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer and a context, and no weight."""
    directory = tmp_path_factory.mktemp("model")
    chat_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 200}))
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments, code=0):
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr()


def arguments(model, data, *more):
    return ("--model", model, "--data", data, "--chat_template", "plain", *more)


def test_json_is_what_the_loop_gets(capsys, model, chats):
    options = ("--eval_fraction", 0, "--rows", 8, "--json", "--batch_size", 2)
    report = json.loads(run(capsys, *arguments(model, chats, *options)).out)
    from transformers import AutoTokenizer

    from qlora_kit.data.chat_template import use_template

    tokenizer = AutoTokenizer.from_pretrained(model)
    use_template(tokenizer, "plain")
    encoded = encode_rows(read_rows(chats), tokenizer, 200)
    train = report["train"]
    assert report["format"] == "messages"
    assert report["max_length"] == 200
    assert (train["rows"], train["tokens"]) == (len(encoded.rows), encoded.tokens)
    assert train["supervised_tokens"] == encoded.supervised_tokens
    assert train["supervised_share"] == encoded.supervised_tokens / encoded.tokens
    assert train["skipped"] == {"no assistant turn": 1, "prompt longer than max_length": 1}
    assert train["skipped_rows"] == [
        [f"{chats}:3", "no assistant turn"],
        [f"{chats}:5", "prompt longer than max_length"],
    ]
    assert (train["truncated"], train["duplicates"]) == (1, 1)
    assert train["truncated_rows"] == [[f"{chats}:4", train["cut_tokens"]]]
    assert train["cut_tokens"] > 200
    assert sum(count for _, _, count in report["bins"]) == len(encoded.rows)
    for first, last, count in report["bins"]:
        lengths = [len(row.input_ids) for row in encoded.rows]
        assert sum(first <= length <= last for length in lengths) == count
    # Padding as the loop's own windows have it.
    pad = padding_id(tokenizer)
    common = {"rows": encoded.rows, "batch_size": 2, "seed": 42, "pad_id": pad}
    packs = make_packs(encoded.rows.lengths, 200, 42)
    assert report["packs"] == len(packs)
    for name, count, more in (
        ("random", 6, {}),
        ("by length", 6, {"group_by_length": True}),
        ("packed", len(packs), {"packs": packs}),
    ):
        schedule = StepSchedule(num_steps=-(-count // 2), **common, **more)
        batches = [batch for micro_batches in schedule for batch in micro_batches]
        total = sum(batch["input_ids"].numel() for batch in batches)
        assert report["padding"][name] == pytest.approx(1 - encoded.tokens / total)
    # The rows, token by token.
    shown = [row for row in report["rows"] if row["skipped"] is None]
    assert [row["tokens"] for row in shown] == [len(row.input_ids) for row in encoded.rows]
    for row, source in zip(shown, encoded.rows, strict=True):
        text = "".join(piece["text"] for piece in row["pieces"])
        assert text == tokenizer.decode(source.input_ids)
        learnt = "".join(piece["text"] for piece in row["pieces"] if piece["trained"])
        assert learnt == tokenizer.decode([t for t in source.labels if t != -100])
        assert sum(piece["tokens"] for piece in row["pieces"]) == len(source.input_ids)
        ends = [p for p in row["pieces"] if p["special"] and p["trained"]]
        assert sum(piece["tokens"] for piece in ends) == source.labels.count(1)
    assert [row["skipped"] for row in report["rows"] if row["skipped"]] == list(train["skipped"])
    assert collate_packs([list(encoded.rows)[:1]], pad)["num_supervised"]


def test_a_config_that_leaves_micro_batches_to_the_plan_is_shown(capsys, model, chats):
    def shown(*more):
        return run(capsys, *arguments(model, chats, "--json", *more)).out

    assert shown("--per_device_train_batch_size", "auto") == shown()


def test_the_terminal_has_rows_counts_lengths_and_reasons(capsys, model, chats):
    out = run(capsys, *arguments(model, chats, "--eval_fraction", 0, "--rows", 4)).out
    assert f"{chats}:1" in out
    assert "⟦hello</s>⟧\nUser:\nq\nAssistant:\n⟦on\n🙂</s>⟧" in out
    # A control token that a user spells is not trained on, and one that ends a turn is.
    assert "spell </s> it\nAssistant:\n⟦it is </s></s>⟧" in out
    assert "skipped: no assistant turn" in out
    assert "tokens, 4 trained on, truncated" in out
    assert "1 row skipped: prompt longer than max_length" in out
    assert f"{chats}:5: prompt longer than max_length" in out
    assert "1 row truncated" in out
    assert "1 row is the same as an earlier one" in out
    assert re.search(r"batches of 8: [\d.]+% in random order, [\d.]+% with --group_by_length", out)
    assert re.search(r"\d+-\d+ +█+ \d", out)


COLOURS = "from qlora_kit.commands.show_data import main; import sys; sys.exit(main(sys.argv[1:]))"


def test_in_colour_the_trained_text_has_its_own(model, chats, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    given = [str(a) for a in arguments(model, chats, "--eval_fraction", 0, "--rows", 1)]
    command = [sys.executable, "-c", COLOURS, *given]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    styles = dict(re.findall(r"(\x1b\[[\d;]+m)([^\x1b]+)\x1b\[0m", out))
    texts = {text: style for style, text in styles.items()}
    assert "⟦" not in out
    found = re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", out)
    style_of = {text: style for style, text in found}
    assert style_of["hello"] != style_of["</s>"]
    assert style_of["<s>"] not in (style_of["hello"], style_of["</s>"])
    assert "Assistant" not in " ".join(texts)
    assert style_of["trained on"] == style_of["hello"]


class Page(html.parser.HTMLParser):
    """The texts of a page by the class of their span; every tag closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.spans, self.text, self.links = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] == "span" and any(t == "pre" for t, _ in self.open):
            self.spans.append((self.open[-1][1].get("class", "").split(), data))


def test_the_page_stands_alone_and_says_the_same(capsys, model, chats, tmp_path):
    path = tmp_path / "page.html"
    options = ("--eval_fraction", 0, "--rows", 4, "--html", path)
    out = run(capsys, *arguments(model, chats, *options)).out
    assert f"page: {path}" in out
    text = path.read_text()
    page = Page(text)
    assert page.links == []
    assert "<script" not in text
    assert "http" not in text
    # The legend says which style is which.
    legend = ("trained on", "its end", "control tokens")
    style = {data: kinds for kinds, data in page.spans if data in legend}
    texts = [(kinds, data) for kinds, data in page.spans if data not in legend]
    learnt = [data for kinds, data in texts if kinds in (style["trained on"], style["its end"])]
    assert "".join(learnt) == "hello</s>on⏎🙂</s>it is </s></s>yes</s>"
    ends = [data for kinds, data in texts if kinds == style["its end"]]
    assert "".join(ends) == "</s>" * 4
    control = [data for kinds, data in texts if kinds == style["control tokens"]]
    assert "".join(control) == "<s>" * 3
    # What a row says is text, never a tag.
    assert "he <b> & 'x'" in page.text
    assert "he &lt;b&gt; &amp;" in text
    for said in ("skipped: no assistant turn", "prompt longer than max_length", "truncated"):
        assert said in page.text


def test_rows_of_prompts_and_texts_are_shown_too(capsys, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "he", "a": "on"}\n' * 3)
    options = ("--columns", "q=prompt,a=completion", "--rows", 1, "--eval_fraction", 0.4)
    out = run(capsys, "--model", model, "--data", path, *options).out
    assert "<s>he⟦on</s>⟧" in out
    assert "rows.jsonl (prompt), max_length 200" in out
    assert "of the held-out rows" not in out
    assert "1 held-out row is also trained on" in out
    text = tmp_path / "book.txt"
    text.write_text("hello he\n" * 100)
    out = run(capsys, "--model", model, "--data", text, "--max_length", 50, "--rows", 2).out
    assert "(part 1 of" in out
    assert "1 row longer than --max_length: the text is cut into several rows" in out


def test_nothing_changes_on_disk_and_nothing_is_written_for_an_error(
    capsys, model, chats, tmp_path
):
    before = tree_hash(model), tree_hash(tmp_path)
    run(capsys, *arguments(model, chats, "--eval_fraction", 0))
    assert (tree_hash(model), tree_hash(tmp_path)) == before
    page = tmp_path / "page.html"
    page.write_text(f"{HEAD}old")
    before = tree_hash(tmp_path)
    chats_gone = tmp_path / "gone.jsonl"
    done = run(capsys, *arguments(model, chats_gone, "--html", page), code=3)
    assert done.err.startswith("error: ")
    assert "gone.jsonl: no such file" in done.err
    assert tree_hash(tmp_path) == before
    for bad, reason in ((tmp_path, "is a directory"), (tmp_path / "no" / "x.html", "no directory")):
        err = run(capsys, *arguments(model, chats, "--html", bad), code=2).err
        assert reason in err


@pytest.mark.parametrize("damage", ["gone", "cut", "wrong type"])
def test_a_broken_tokenizer_is_named(capsys, chats, tmp_path, damage):
    directory = tmp_path / "model"
    chat_tokenizer().save_pretrained(directory)
    path = directory / "tokenizer.json"
    raw = path.read_text()
    path.unlink()
    if damage != "gone":
        path.write_text(raw[:1000] if damage == "cut" else "[1, 2]")
    err = run(capsys, *arguments(directory, chats), code=3).err
    assert err.splitlines()[-1].startswith("error: ")
    assert "tokenizer" in err
    assert len(err.splitlines()[-1]) <= ERROR_LINE_LIMIT


def model_with_template(tmp_path, template):
    """A directory with a tokenizer whose tokenizer_config.json has this `chat_template` alone."""
    directory = tmp_path / "model"
    chat_tokenizer().save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return directory


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{% if x", "is no Jinja"), ({"=": "{{ x }}"}, "no default")],
)
def test_a_broken_template_is_named_where_chats_are_read_and_not_before(
    capsys, chats, tmp_path, template, reason
):
    directory = model_with_template(tmp_path, template)
    err = run(capsys, "--model", directory, "--data", chats, code=3).err
    assert "chats.jsonl:1: " in err
    assert reason in err
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "he hello"}\n')
    run(capsys, "--model", directory, "--data", texts)


@pytest.mark.parametrize("template", [{"=": None}, {"default": None}, 5])
def test_a_template_that_is_no_text_is_named_whatever_the_rows_are(
    capsys, chats, tmp_path, template
):
    directory = model_with_template(tmp_path, template)
    err = run(capsys, "--model", directory, "--data", chats, code=3).err
    assert f"{directory / 'tokenizer_config.json'}: chat_template is" in err


@pytest.mark.parametrize("context", ["many", -5, 2.5, [200]])
def test_a_context_that_is_none_is_named(capsys, chats, tmp_path, context):
    directory = tmp_path / "model"
    chat_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    before = tree_hash(tmp_path)
    err = run(capsys, *arguments(directory, chats), code=3).err
    said = f"config.json: max_position_embeddings is {context}; correct the file"
    assert err.splitlines()[-1] == f"error: {directory}/{said}"
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (("--rows", "-1"), 2, "rows must be"),
        (("--columns", "a=b"), 2, "is not NAME=FIELD"),
        (("--packing", "--group_by_length"), 2, "packing and group_by_length"),
        (("--max_length", "201"), 2, "max_length 201 is above the model's context of 200"),
        (("--chat_template", "vicuna"), 2, "neither a file nor one of ours"),
        (("--rwos", "1"), 2, "did you mean --rows"),
        (("--max_length", "5"), 3, "cannot be trained on"),
    ],
)
def test_what_cannot_be_is_refused(capsys, model, chats, flags, code, reason):
    err = run(capsys, "--model", model, "--data", chats, *flags, code=code).err
    if "--chat_template" not in flags and code == 3:
        err = run(capsys, *arguments(model, chats, *flags), code=code).err
    assert reason in err
    assert err.splitlines()[-1].startswith("error: ")


def test_bars_hold_every_length_once():
    for lengths in ([5], [1, 1000], list(range(7, 90)), [3] * 9 + [4]):
        bins = data_report._bins(lengths)
        assert len(bins) <= data_report.BINS
        assert sum(count for _, _, count in bins) == len(lengths)
        assert all(a[1] + 1 == b[0] for a, b in pairwise(bins))


def test_a_page_replaces_a_page_and_nothing_else(capsys, model, chats, tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    shutil.copy(chats, rows)
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "my.html").write_text('<!doctype html>\n<html lang="en"><p>mine</p></html>')
    (tmp_path / "link.html").symlink_to(rows)
    (tmp_path / "nothing.html").symlink_to("not_there")
    (tmp_path / "empty.yaml").write_text("rows: 1\n")
    os.mkfifo(tmp_path / "pipe.html")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    base = tmp_path / "base"
    for name in ("rows.jsonl", "link.html", "base/config.json", "my.html", "empty.yaml"):
        more = ("--html", tmp_path / name, "--config", tmp_path / "empty.yaml")
        err = run(capsys, *arguments(base, rows, *more), code=2).err
        assert "is there, and is no page of show-data; name a new file" in err
    for name in ("pipe.html", "nothing.html"):
        err = run(capsys, *arguments(base, rows, "--html", tmp_path / name), code=2).err
        assert "is not a regular file" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for count in (1, 2):
        run(capsys, *arguments(base, rows, "--rows", count, "--html", page))
    assert page.read_text().count(f"── {rows}:") == 2
    # A page may itself be what is read.
    shutil.copy(page, tmp_path / "page.txt")
    text = (tmp_path / "page.txt").read_bytes()
    err = run(
        capsys, *arguments(base, tmp_path / "page.txt", "--html", tmp_path / "page.txt"), code=2
    ).err
    assert "is read here" in err
    assert (tmp_path / "page.txt").read_bytes() == text


def test_what_a_run_would_refuse_is_shown_with_the_reason(capsys, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q" * n, "completion": "on"} for n in (300, 300, 300, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--eval_fraction", 0, "--rows", 4)
    for more, said, kept in (
        ((), "3 of 4 rows, from here on, cannot be trained on", 1),
        (("--long_rows", "error"), "rows.jsonl:1: the row has 304 tokens or more", 1),
        (("--max_length", 4), "4 of 4 rows", 0),
    ):
        done = run(capsys, "--model", model, "--data", path, *options, *more, code=3)
        assert said in done.err.splitlines()[-1]
        assert f"{kept} row{'' if kept == 1 else 's'}, " in done.out
        assert "skipped: prompt longer than max_length" in done.out
        report = json.loads(
            run(capsys, "--model", model, "--data", path, *options, *more, "--json", code=3).out
        )
        assert said in report["refusal"]
        assert report["train"]["rows"] == kept
    done = run(capsys, "--model", model, "--data", path, *options, "--long_rows", "drop")
    assert "3 rows skipped: longer than max_length" in done.out


def test_fields_and_control_tokens_are_in_the_summary(capsys, tmp_path):
    directory = tmp_path / "model"
    chat_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 200}))
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "<s><|im_start|>he", "completion": "on</s>", "id": n} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", directory, "--data", path, "--eval_fraction", 0)
    out = run(capsys, *options).out
    assert 'fields of rows that are not used: "id" (3)' in out
    assert "9 control tokens spelled in rows are read as tokens; --literal_control_tokens" in out
    assert "6 starts and ends that rows spell are written once" in out
    assert "6 tokens, 3 trained on, 3 control tokens" in out
    train = json.loads(run(capsys, *options, "--json").out)["train"]
    assert (train["unused"], train["control_tokens"], train["doubled"]) == ({"id": 3}, 9, 6)
    assert train["unknown_share"] == 0


def test_a_page_may_lie_in_the_directory_of_its_data(capsys, model, chats, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(chats, tmp_path / "data" / "train.jsonl")
    for _ in range(2):
        page = tmp_path / "data" / "page.html"
        run(capsys, *arguments(model, tmp_path / "data", "--eval_fraction", 0, "--html", page))
    assert page.read_text().startswith(HEAD)
