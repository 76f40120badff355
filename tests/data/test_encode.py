import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from chat_tokenizer import sentencepiece_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.data import encode as prompt_module
from qlora_kit.data.chat_mask import LEFT_OUT, NO_TURN
from qlora_kit.data.encode import encode_rows, prompt_ids
from qlora_kit.data.labels import (
    CONTROL,
    DROPPED,
    ONE_TOKEN,
    REMEDIES,
    TOO_LONG,
    TOO_LONG_ANSWER,
)
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Row, read_rows
from qlora_kit.data.tokens import Encoded, Skipped
from qlora_kit.errors import DataError, TokenizerError

DATA = os.environ.get("QLORA_KIT_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="QLORA_KIT_DATA is not set")

# ChatML with and without a BOS, with and without marks; the end token is <|im_end|>.
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
MARKED_TURN = (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
)
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER
MARKED = "{% for m in messages %}" + MARKED_TURN + "{% endfor %}" + HEADER
TEMPLATES = {"plain": CHATML, "marked": MARKED}

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "h"), ("o", "n"), ("Ċ", "Ċ"), ("h", "e"), ("l", "l"), (":", "Ġ")]


def make_tokenizer(template=None, adds_bos=True, eos="<|im_end|>", pad=None, sentencepiece=False):
    """A byte-level BPE tokenizer (or one that puts a space before every text), made here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = MERGES
    if sentencepiece:
        alphabet = ["▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
        merges = [("▁", "h"), ("o", "n")]
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=sentencepiece, fuse_unk=True))
    if sentencepiece:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = sentencepiece_decoder()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(row, *arguments):
    """The one encoding of a row that has one, or why it is skipped."""
    result = prompt_module.encode(row, *arguments)
    if isinstance(result, Skipped):
        return result
    (one,) = result
    return one


def row(**content):
    return Row(content, "rows.jsonl", 7)


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return row(messages=[{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)])


TOKENIZERS = {
    "bytes, BOS": make_tokenizer(),
    "bytes, no BOS": make_tokenizer(adds_bos=False),
    "sentencepiece": make_tokenizer(sentencepiece=True),
    "pad is eos": make_tokenizer(eos="</s>", pad="</s>"),
}
CHATS = {
    f"{name}, {kind}": make_tokenizer(template, **options)
    for kind, template in TEMPLATES.items()
    for name, options in {
        "bytes, BOS": {},
        "no BOS": {"adds_bos": False},
        "pad is end": {"pad": "<|im_end|>"},
        "sentencepiece": {"sentencepiece": True},
    }.items()
}
words = st.text(st.sampled_from("heo nl:\nq<s>/|é😀"), max_size=12)
some_words = words.filter(str.strip)


# --- a masker written apart -------------------------------------------------------------------


def reference(tokenizer, content, adds_bos, train_on_prompt=False):
    """Ids and labels piece by piece: `[(ids, trained)]`, never more than one text at a time."""
    backend = tokenizer.backend_tokenizer

    def pieces_of(text):
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def behind(text):
        # No space is put before what follows a prompt: here in pieces that hold one character.
        spaced = tokenizer.convert_tokens_to_ids("▁") in pieces_of("o")
        return pieces_of("\n" + text)[2:] if spaced else pieces_of(text)

    bos = [tokenizer.convert_tokens_to_ids("<s>")]
    pieces = [(bos, None)] if adds_bos else []
    if "text" in content:
        pieces += [(pieces_of(content["text"]), True), ([tokenizer.eos_token_id], True)]
    elif "prompt" in content:
        pieces += [
            (pieces_of(content["prompt"]), False),
            (
                behind(content["completion"])
                if content["prompt"]
                else pieces_of(content["completion"]),
                True,
            ),
            ([tokenizer.eos_token_id], True),
        ]
    else:
        start, end = map(tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
        for turn in content["messages"]:
            learn = turn["role"] == "assistant"
            # Between two control tokens the template's text is one piece to the tokenizer.
            header = pieces_of(turn["role"] + "\n")
            both = pieces_of(turn["role"] + "\n" + turn["content"])
            assert both[: len(header)] == header
            pieces += [([start], False), (header, False), (both[len(header) :], learn)]
            # Generation stops at the end token: the line end behind it is never the model's.
            pieces += [([end], learn), (pieces_of("\n"), False)]
    ids = [token for piece, _ in pieces for token in piece]
    labels = [
        token if learn or (train_on_prompt and learn is not None) else -100
        for piece, learn in pieces
        for token in piece
    ]
    return ids, [-100, *labels[1:]]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(some_words, some_words, st.booleans())
def test_text_and_prompt_rows_equal_a_masker_written_apart(name, prompt, completion, whole):
    tokenizer = TOKENIZERS[name]
    for content in (
        {"text": prompt},
        {"prompt": prompt, "completion": completion},
        {"prompt": "", "completion": completion},
    ):
        result = encode(replace(row(**content), literal=True), tokenizer, 1000, EncodeRules(whole))
        assert isinstance(result, Encoded)
        assert (result.input_ids, result.labels) == reference(
            tokenizer, content, "no BOS" not in name, whole
        )
        assert not result.truncated
        # The end is trained on, also where it is what rows are padded with.
        assert result.labels[-1] == tokenizer.eos_token_id
        if "prompt" in content:
            before = prompt_ids(content["prompt"], tokenizer, literal=True)
            assert result.input_ids[: len(before)] == before
            ids = result.input_ids[tokenizer.bos_token_id in result.input_ids : -1]
            both = content["prompt"] + completion
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == both


turns = st.text(st.sampled_from("heo nl:q\né😀"), max_size=10).filter(lambda t: t == t.lstrip())


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=40, deadline=None)
@given(st.lists(turns, min_size=2, max_size=5), st.booleans())
def test_chats_equal_a_masker_written_apart_and_the_template(name, texts, whole):
    # One BOS, end tokens trained on, and the same place for what generation is handed.
    tokenizer = CHATS[name]
    result = encode(chat(*texts), tokenizer, 1000, EncodeRules(whole))
    assert isinstance(result, Encoded)
    messages = chat(*texts).content["messages"]
    assert (result.input_ids, result.labels) == reference(
        tokenizer, {"messages": messages}, "no BOS" not in name, whole
    )
    bos = [tokenizer.bos_token_id] if "no BOS" not in name else []
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert result.input_ids == bos + rendered
    assert result.input_ids.count(tokenizer.bos_token_id) == len(bos)
    if not whole:
        assert result.labels.count(tokenizer.eos_token_id) == len(texts) // 2
    before = prompt_ids(texts[0], tokenizer, chat=True)
    assert result.input_ids[: len(before)] == before
    assert whole or set(result.labels[: len(before)]) == {-100}
    assert result.labels[len(before)] != -100


@pytest.mark.parametrize("name", CHATS)
def test_what_is_trained_on_in_a_chat_is_the_answers(name):
    tokenizer = CHATS[name]
    result = encode(chat("he", "on", "q", "hello"), tokenizer, 1000)
    runs, run = [], []
    for label in [*result.labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run).strip())
            run = []
    assert runs == ["on<|im_end|>", "hello<|im_end|>"]


# --- one start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_there_is_one_bos_whatever_template_and_tokenizer_do(kind, written, adds_bos):
    template = "{{ bos_token }}" * written + TEMPLATES[kind]
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    bare = encode(chat("he", "on"), make_tokenizer(TEMPLATES[kind], adds_bos=False), 100)
    bos = [tokenizer.bos_token_id] if adds_bos or written else []
    result = encode(chat("he", "on"), tokenizer, 100)
    assert result.input_ids == bos + bare.input_ids
    assert result.labels == [-100] * len(bos) + bare.labels
    before = prompt_ids("he", tokenizer, chat=True)
    assert before[: len(bos)] == bos
    assert before == result.input_ids[: len(before)]
    assert encode(row(text="he"), tokenizer, 9).input_ids.count(tokenizer.bos_token_id) == adds_bos


def test_a_tokenizer_that_adds_the_end_does_not_end_twice():
    tokenizer = make_tokenizer(eos="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    reference = encode(row(prompt="he", completion="on"), make_tokenizer(eos="</s>"), 100)
    assert encode(row(prompt="he", completion="on"), tokenizer, 100) == reference
    assert prompt_ids("he", tokenizer) == reference.input_ids[:2]


def test_gpt2_like_rows_begin_without_bos_and_end_with_it():
    tokenizer = make_tokenizer(adds_bos=False, eos="<s>", pad="<s>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    result = encode(row(text="heon"), tokenizer, 100)
    ids = tokenizer("heon")["input_ids"]
    assert (result.input_ids, result.labels) == ([*ids, 0], [-100, *ids[1:], 0])


# --- control tokens in a row's text --------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_in_text_stay_text_where_asked(name):
    tokenizer = TOKENIZERS[name]
    text = "".join(SPECIAL)
    control = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    start = 0 if "no BOS" in name else 1
    for content in ({"text": text}, {"prompt": text, "completion": text}):
        ids = encode(replace(row(**content), literal=True), tokenizer, 1000).input_ids
        assert not control.intersection(ids[start:-1])
        expected = text * len(content)
        assert tokenizer.decode(ids[start:-1]).replace(" ", "") == expected
    # The tokenizer is left as it was: control tokens are read as such by everyone else.
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [1]


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from("heo<|>"), max_size=4), min_size=2, max_size=2), st.data())
def test_a_control_token_in_a_message_is_the_characters_of_its_name(name, parts, data):
    tokenizer = CHATS[name]
    control = data.draw(st.sampled_from(SPECIAL))
    text = control.join(parts)
    for turns in ([text, "on"], ["he", text], ["he", "on", text, "on"]):
        result = encode(chat(*turns), tokenizer, 1000)
        bare = encode(chat(*("x" for _ in turns)), tokenizer, 1000)
        # As many control tokens as the template writes by itself, and the text as it was.
        for token in SPECIAL:
            index = tokenizer.convert_tokens_to_ids(token)
            assert result.input_ids.count(index) == bare.input_ids.count(index)
        whole = tokenizer.decode(result.input_ids, clean_up_tokenization_spaces=False)
        assert text.replace(" ", "") in whole.replace(" ", "")
        learnt = tokenizer.decode([t for t in result.labels if t != -100])
        answers = "".join(f"{answer}<|im_end|>" for answer in turns[1::2])
        assert learnt.replace(" ", "") == answers.replace(" ", "")
        before = prompt_ids(turns[0], tokenizer, chat=True)
        assert result.input_ids[: len(before)] == before


@pytest.mark.parametrize("kind", TEMPLATES)
def test_thoughts_are_tokens_in_an_answer_and_text_in_a_question(kind):
    # An added token that is not special, which the template itself writes, as Qwen 3's <think>.
    template = TEMPLATES[kind] + "{% if false %}<think>{% endif %}"
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("\n\n", special=False)])
    think = tokenizer.convert_tokens_to_ids("<think>")
    result = encode(chat("he<think>", "<think>on"), tokenizer, 100)
    assert result.input_ids.count(think) == result.labels.count(think) == 1
    assert "he<think>" in tokenizer.decode(result.input_ids)
    # One that the template does not write is a word like any other: here as upstream.
    tokenizer.chat_template = TEMPLATES[kind]
    result = encode(chat("he<think>", "on"), tokenizer, 100)
    assert result.input_ids.count(think) == 1


@pytest.mark.parametrize("kind", TEMPLATES)
def test_private_characters_in_messages_are_text(kind):
    # The characters that mark places in a rendering, written by a user.
    tokenizer = make_tokenizer(TEMPLATES[kind])
    text = "h\ue000\ue001\ue0020\ue002o"
    result = encode(chat(text, text), tokenizer, 200)
    assert tokenizer.decode(result.input_ids).count(text) == 2
    learnt = tokenizer.decode([t for t in result.labels if t != -100])
    assert learnt == text + "<|im_end|>"


# --- length -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(some_words, st.integers(2, 30), st.booleans())
def test_a_long_text_becomes_rows_that_train_each_token_once(text, max_length, adds_bos):
    tokenizer = TOKENIZERS["bytes, BOS" if adds_bos else "bytes, no BOS"]
    start = [0] if adds_bos else []
    full = encode(row(text=text), tokenizer, 1000)
    rows = prompt_module.encode(row(text=text), tokenizer, max_length)
    assert all(2 <= len(part.input_ids) <= max_length for part in rows)
    assert all(part.truncated == (len(full.input_ids) > max_length) for part in rows)
    learnt = [label for part in rows for label in part.labels if label != -100]
    assert learnt == [label for label in full.labels if label != -100]
    for part in rows:
        assert part.labels[0] == -100
        assert part.labels[1:] == part.input_ids[1:]
        assert part.input_ids[: len(start)] == start
    # Without a start each row begins with the token before its first one.
    if not adds_bos:
        for before, after in pairwise(rows):
            assert after.input_ids[0] == before.input_ids[-1]


@settings(max_examples=100, deadline=None)
@given(words, some_words, st.integers(2, 30), st.booleans())
def test_a_cut_prompt_loses_its_beginning_and_the_completion_nothing(
    prompt, completion, max_length, whole
):
    tokenizer = TOKENIZERS["bytes, BOS"]
    full = encode(row(prompt=prompt, completion=completion), tokenizer, 1000, EncodeRules(whole))
    cut = encode(
        row(prompt=prompt, completion=completion), tokenizer, max_length, EncodeRules(whole)
    )
    before, length = len(prompt_ids(prompt, tokenizer)), len(full.input_ids)
    answer = full.input_ids[before:]
    if length <= max_length:
        assert cut == full
    elif before >= max_length:
        assert cut == Skipped(TOO_LONG)
    elif 1 + len(answer) >= max_length:
        assert cut == Skipped(TOO_LONG_ANSWER)
    else:
        kept = full.input_ids[length - max_length + 1 :]
        labels = kept if whole else [-100] * (len(kept) - len(answer)) + answer
        assert cut == Encoded([0, *kept], [-100, *labels], True)


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(st.lists(turns, min_size=2, max_size=6), st.integers(2, 60))
def test_a_long_chat_ends_with_the_last_turn_that_fits_whole(kind, texts, max_length):
    tokenizer = make_tokenizer(TEMPLATES[kind])
    end = tokenizer.eos_token_id
    full = encode(chat(*texts), tokenizer, 1000)
    cut = encode(chat(*texts), tokenizer, max_length)
    ends = [i + 1 for i, label in enumerate(full.labels) if label == end]
    fits = [place for place in ends if place <= max_length]
    if len(full.input_ids) <= max_length:
        assert cut == full
    elif fits:
        assert cut == Encoded(full.input_ids[: fits[-1]], full.labels[: fits[-1]], True)
        assert cut.labels[-1] == end
    else:
        begins = next(i for i, label in enumerate(full.labels) if label != -100)
        assert cut == Skipped(TOO_LONG if begins >= max_length else TOO_LONG_ANSWER)


def test_what_cannot_be_trained_on_is_skipped_with_its_reason():
    tokenizer = make_tokenizer(CHATML, adds_bos=False)
    assert encode(row(text=""), tokenizer, 100) == Skipped(ONE_TOKEN)
    assert encode(row(prompt="", completion=""), tokenizer, 100) == Skipped(ONE_TOKEN)
    assert encode(chat("he"), tokenizer, 100) == Skipped(NO_TURN)
    assert encode(chat("he", "on"), tokenizer, 3) == Skipped(TOO_LONG)
    assert encode(row(prompt="heq", completion="on"), tokenizer, 2) == Skipped(TOO_LONG)
    assert isinstance(encode(row(prompt="heq", completion="on"), tokenizer, 3), Encoded)
    assert set(REMEDIES) == {
        TOO_LONG,
        TOO_LONG_ANSWER,
        DROPPED,
        NO_TURN,
        ONE_TOKEN,
        CONTROL,
        LEFT_OUT,
    }


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_turn_of_weight_zero_is_read_and_not_learnt(kind):
    tokenizer = make_tokenizer(TEMPLATES[kind])
    weighted = chat("he", "on", "q", "hello")
    full = encode(weighted, tokenizer, 100)
    weighted.content["messages"][1]["weight"] = 0
    weighted.content["messages"][3]["weight"] = 1
    result = encode(weighted, tokenizer, 100)
    assert result.input_ids == full.input_ids
    assert tokenizer.decode([t for t in result.labels if t != -100]) == "hello<|im_end|>"
    weighted.content["messages"][3]["weight"] = 0
    assert encode(weighted, tokenizer, 100) == Skipped(NO_TURN)


def test_rows_are_counted():
    tokenizer = make_tokenizer(adds_bos=False)
    rows = [row(prompt="q" * n, completion="on") for n in range(1, 8)]
    result = encode_rows(rows, tokenizer, 5)
    singles = [encode(r, tokenizer, 5) for r in rows]
    kept = [r for r in singles if isinstance(r, Encoded)]
    assert [(r.input_ids, r.labels) for r in result.rows] == [(r.input_ids, r.labels) for r in kept]
    assert result.skipped == {TOO_LONG: 3}
    assert result.lost == tuple((r.where, TOO_LONG) for r in rows[4:])
    assert result.truncated == result.cut_tokens == 1
    assert result.tokens == 3 + 4 + 5 + 5
    assert result.supervised_tokens == 2 * 4
    # The row of four letters lost its first and is now the row of three letters.
    assert result.duplicates == 1


def test_rows_that_are_shared_and_rows_that_are_there_twice_are_counted():
    tokenizer = make_tokenizer()
    one = [row(prompt=p, completion="on") for p in "abcabb"]
    other = [row(prompt=p, completion="on") for p in "xbyb"]
    encoded, held_out = (encode_rows(rows, tokenizer, 50) for rows in (one, other))
    assert (encoded.duplicates, held_out.duplicates) == (3, 1)
    assert held_out.shared_with(encoded) == 2
    assert encoded.shared_with(held_out) == 3
    # Equal tokens that are not trained on alike are other rows.
    assert (
        encode_rows([row(prompt="a", completion="on"), row(text="aon")], tokenizer, 50).duplicates
        == 0
    )


def test_losing_more_than_half_of_the_rows_is_an_error():
    tokenizer = make_tokenizer(CHATML)
    good, long, silent = chat("he", "on"), row(prompt="q" * 99, completion="a"), chat("he")
    assert len(encode_rows([good, good, long, silent], tokenizer, 90).rows) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:7: 3 of 5 rows.*") as caught:
        encode_rows([good, long, long, silent, good], tokenizer, 90)
    assert "prompt longer than max_length: 2, no assistant turn: 1" in caught.value.problem
    assert "--max_length" in caught.value.remedy
    with pytest.raises(DataError, match=r"1 of 1 rows.*assistant turn"):
        encode_rows([silent], tokenizer, 90)
    with pytest.raises(DataError, match="no rows"):
        encode_rows([], tokenizer, 90)


# --- templates that cannot be trusted -----------------------------------------------------------


def test_without_a_template_chats_are_refused_and_prompts_are_not():
    tokenizer = make_tokenizer()
    with pytest.raises(
        TokenizerError, match=r"rows\.jsonl:7: .*no chat template; use rows of prompt"
    ):
        encode(chat("he", "on"), tokenizer, 100)
    with pytest.raises(TokenizerError, match="no chat template"):
        prompt_ids("he", tokenizer, chat=True)
    assert isinstance(encode(row(prompt="he", completion="on"), tokenizer, 100), Encoded)


def test_without_an_end_token_rows_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="no end-of-sequence token"):
        encode(row(text="he"), tokenizer, 100)


@pytest.mark.parametrize(
    ("marked", "reason"),
    [
        # the end token outside of the marks
        ("{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}", "end token"),
        # nothing marked
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}", "marks 0 of"),
    ],
)
@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_marks_that_leave_something_out_are_refused(marked, reason, eos):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(TokenizerError, match=rf"rows\.jsonl:7: .*{reason}"):
        encode(chat("he", "on", "q", "on"), make_tokenizer(template, eos=eos), 100)


THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'think ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + HEADER
)


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each():
    # As Qwen3's does: the last answer carries a thinking block, the same answer later does not.
    tokenizer = make_tokenizer(THOUGHTS)
    assert (
        encode(chat("he", "on"), tokenizer, 100)
        == prompt_module.encode(chat("he", "on"), tokenizer, 100)[0]
    )
    turns = ["he", "on", "q", "hello"]
    rows = prompt_module.encode(chat(*turns), tokenizer, 100)
    assert len(rows) == 2
    for number, part in enumerate(rows, 1):
        upto = chat(*turns[: 2 * number]).content["messages"]
        rendered = tokenizer.apply_chat_template(upto, tokenize=True, return_dict=False)
        assert part.input_ids == [tokenizer.bos_token_id, *rendered]
        answer = tokenizer.decode([t for t in part.labels if t != -100])
        assert answer == f"think {turns[2 * number - 1]}<|im_end|>"
    weighted = chat(*turns)
    weighted.content["messages"][1]["weight"] = 0
    assert prompt_module.encode(weighted, tokenizer, 100) == rows[1:]


def test_a_template_whose_header_is_not_the_beginning_of_an_answer_is_refused():
    # Neither marks nor prefixes show the place.
    template = THOUGHTS.replace("assistant\n' }}{% endif %}", "assistant says\n' }}{% endif %}")
    assert template != THOUGHTS
    with pytest.raises(TokenizerError, match=r"rows\.jsonl:7: .*message 1 does not begin"):
        encode(chat("he", "on", "q", "on"), make_tokenizer(template), 100)


@pytest.mark.parametrize(
    ("template", "change"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), {}),
        ("{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + HEADER, {}),
        (CHATML, {"tool_calls": [{"function": {"name": "f"}}]}),
        (CHATML, {"reasoning_content": "hm"}),
    ],
)
def test_what_a_template_leaves_out_is_noticed(template, change):
    messages = [
        {"role": "system", "content": "s y s"},
        {"role": "user", "content": "he"},
        {"role": "assistant", "content": "on", **change},
    ]
    tokenizer = make_tokenizer(template)
    named = f": {next(iter(change))}" if change else ""
    assert encode(row(messages=messages), tokenizer, 100) == Skipped(LEFT_OUT + named)
    plain = [{**m} for m in messages]
    plain[2] = {"role": "assistant", "content": "on"}
    assert isinstance(encode(row(messages=plain), make_tokenizer(CHATML), 100), Encoded)
    left = encode(row(messages=plain, tools=[{"name": "f"}]), tokenizer, 100)
    assert left == Skipped(f"{LEFT_OUT}: tools")


@pytest.mark.parametrize("marked", [False, True])
def test_calls_and_answers_of_tools_go_to_the_template(marked):
    answer = "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    body = answer + "{{ '<|im_end|>' }}"
    if marked:
        body = "{% generation %}" + body + "{% endgeneration %}"
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}" + body + ""
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + HEADER
    )
    call = {"name": "f", "arguments": {"x": "<|im_end|>"}}
    content = {
        "messages": [
            {"role": "user", "content": "he"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "on"},
        ],
        "tools": [{"name": "f"}],
    }
    tokenizer = make_tokenizer(template)
    result = encode(row(**content), tokenizer, 500)
    learnt = tokenizer.decode([t for t in result.labels if t != -100])
    written = '{"name": "f", "arguments": {"x": "<|im_end|>"}}'
    assert learnt == f"{written}<|im_end|>on<|im_end|>"
    assert result.labels.count(tokenizer.eos_token_id) == 2
    assert '[{"name": "f"}]' in tokenizer.decode(result.input_ids)
    assert "tool\n4" in tokenizer.decode(result.input_ids)


def test_a_template_that_refuses_is_told_with_the_line():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*roles must alternate"):
        encode(chat("he", "on"), make_tokenizer(template), 100)
    with pytest.raises(TokenizerError, match=r"rows\.jsonl:7: .*no Jinja template: line 1"):
        encode(chat("he", "on"), make_tokenizer("{% for %}"), 100)


def test_a_token_across_the_border_of_a_turn_is_the_turns():
    # ": " is one token of this tokenizer, and the header ends in its middle.
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    across = encode(chat("he", " on"), tokenizer, 100)
    assert isinstance(across, Encoded)
    assert tokenizer.decode([t for t in across.labels if t != -100]) == ": on<|im_end|>"
    behind = encode(chat("he", "on"), tokenizer, 100)
    assert isinstance(behind, Encoded)
    assert tokenizer.decode([t for t in behind.labels if t != -100]) == "on<|im_end|>"


def test_text_of_a_template_is_never_found_by_its_ids():
    # The user says what the template writes before an answer, as far as that is plain text.
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    result = encode(chat("assistant\nhe\n", "on"), tokenizer, 100)
    trained = [label for label in result.labels if label != -100]
    assert tokenizer.decode(trained) == "on\n"


# --- real tokenizers ----------------------------------------------------------------------------


@needs_data
def test_stories260k_on_wikisql():
    base = Path(DATA or "")
    tokenizer = AutoTokenizer.from_pretrained(base / "models/stories260K")
    assert tokenizer.pad_token_id is None
    rows = list(read_rows(base / "text/wikisql/valid.jsonl"))
    result = encode_rows(rows, tokenizer, 512)
    assert (len(result.rows), result.skipped, result.truncated) == (100, {}, 0)
    for source, encoded in zip(rows, result.rows, strict=True):
        before = prompt_ids(source.content["prompt"], tokenizer)
        assert before == tokenizer(source.content["prompt"])["input_ids"]
        assert encoded.input_ids[: len(before)] == before
        assert encoded.input_ids[-1] == 2
        both = source.content["prompt"] + source.content["completion"]
        assert tokenizer.decode(encoded.input_ids[1:-1]) == both
        assert encoded.labels == [-100] * len(before) + encoded.input_ids[len(before) :]
    assert result.tokens == sum(len(r.input_ids) for r in result.rows)


@needs_data
@pytest.mark.parametrize("kind", TEMPLATES)
def test_stories260k_with_a_template(kind):
    tokenizer = AutoTokenizer.from_pretrained(Path(DATA or "") / "models/stories260K")
    # No control tokens but <s> and </s>: the turns' borders lie in plain text.
    turn = TEMPLATES[kind].replace("<|im_start|>", "### ").replace("<|im_end|>", "</s>")
    tokenizer.chat_template = "{{ bos_token }}" + turn
    result = encode(chat("Who?", "Tim.", "Why?", "He ran."), tokenizer, 512)
    trained = [label for label in result.labels if label != -100]
    assert result.labels.count(2) == 2
    assert result.input_ids.count(1) == 1
    text = tokenizer.decode(trained).replace("\n", "").replace(" ", "")
    assert text == "Tim.</s>Heran.</s>"
    before = prompt_ids("Who?", tokenizer, chat=True)
    assert result.input_ids[: len(before)] == before


@needs_data
def test_gpt2_has_no_bos_and_trains_its_end():
    base = Path(DATA or "") / "tokenizers/gpt2"
    backend = Tokenizer(models.BPE.from_file(str(base / "vocab.json"), str(base / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end
    )
    result = encode(row(prompt="Hello", completion=" world" + end), tokenizer, 100)
    # 15496 "Hello", 995 " world"; the end spelled in the text is seven tokens of text.
    assert result.input_ids[:2] == [15496, 995]
    assert result.input_ids.count(50256) == 1
    assert result.labels == [-100, *result.input_ids[1:]]
    assert prompt_ids("Hello", tokenizer) == [15496]


@pytest.mark.parametrize("in_chat", [False, True])
def test_a_prompt_beyond_the_limit_is_not_read_to_its_end(in_chat):
    tokenizer = CHATS["bytes, BOS, plain"] if in_chat else TOKENIZERS["bytes, BOS"]
    # In a chat each control token is taken apart; a plain text is read piece by piece.
    prompt = "<|im_end|>" * 500 if in_chat else "he on\n" * (prompt_module.PIECE // 3)
    whole = prompt_ids(prompt, tokenizer, in_chat)
    assert prompt_ids(prompt, tokenizer, in_chat, limit=len(whole)) == whole
    some = prompt_ids(prompt, tokenizer, in_chat, limit=100)
    assert 100 < len(some) < len(whole) * 3 / 4
    start = whole.index(some[0])  # perhaps behind what begins a text
    assert some == whole[start : start + len(some)]


@pytest.mark.parametrize("single", ["<s>", []])
def test_a_tokenizer_whose_template_leaves_the_text_out_is_named(single):
    tokenizer = make_tokenizer()
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[start]
    )
    with pytest.raises(TokenizerError, match="correct the post_processor"):
        prompt_ids("a day", tokenizer)
