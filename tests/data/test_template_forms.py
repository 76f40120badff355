"""Templates of the forms that real families have: a turn is trained as the model will meet it."""

import pytest
from chat_tokenizer import chat_tokenizer, sentencepiece_decoder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.answers import chat_ids, ends_text, turn_ends
from qlora_kit.data.chat_mask import LEFT_OUT
from qlora_kit.data.chat_template import ChatOptions
from qlora_kit.data.encode import encode, prompt_ids
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Row
from qlora_kit.data.tokens import Skipped
from qlora_kit.errors import DataError, TokenizerError

U, A, S, T = "user", "assistant", "system", "tool"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# The prompt begins a thought; earlier thoughts are dropped, and no turn is written with one.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>' + "
    "m.content.split('</think>')[-1] + '<|im_end|>' }}{% else %}{{ '<|user|>' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)
# The system text stands with the last user's message, where that is the last of all.
LAST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[' + "
    "(s + '\n\n' if s and loop.last else '') + m.content + ']' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# A tool's answer ends in another way once something follows it.
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>tool\n' + m.content }}"
    "{{ '' if loop.last else '\n' }}{{ '<|im_end|>' }}{% else %}" + TURN + "{% endif %}{% endfor %}"
) + HEADER
# The prompt opens a thought that the turn, without one, closes at once.
CLOSED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant<|eot_id|>' + "
    "'</think>' + m.content + '<|im_end|>\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|eot_id|>\n' }}{% endif %}"
)
# The whole chat's end has a mark of its own.
MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}{% if not add_generation_prompt %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)


def chat(*turns, **weights):
    messages = [{"role": role, "content": content} for role, content in turns]
    for index, weight in weights.items():
        messages[int(index[1:])]["weight"] = weight
    return Row({"messages": messages}, "rows.jsonl", 1)


def tokenizer_of(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shown(rows, tokenizer):
    """`(what is read before the first learnt token, what is learnt)` of each row."""
    assert not isinstance(rows, Skipped), rows
    found = []
    for row in rows:
        learnt = [label for label in row.labels if label != -100]
        before = row.input_ids[: row.labels.index(learnt[0])]
        found.append((tokenizer.decode(before), tokenizer.decode(learnt)))
    return found


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (R1, [(U, "2"), (A, "4")], [("<s><|user|>2<|im_start|><think>\n", "4<|im_end|>")]),
        (
            R1,
            [(U, "2"), (A, "<think>\nhm\n</think>\n\n4"), (U, "3"), (A, "6")],
            [
                ("<s><|user|>2<|im_start|><think>\n", "hm\n</think>\n\n4<|im_end|>"),
                (
                    "<s><|user|>2<|im_start|>\n\n4<|im_end|><|user|>3<|im_start|><think>\n",
                    "6<|im_end|>",
                ),
            ],
        ),
        (
            LAST,
            [(S, "Be."), (U, "a"), (A, "b"), (U, "c"), (A, "d")],
            [("<s>[Be.\n\na]", " b</s>"), ("<s>[a] b</s>[Be.\n\nc]", " d</s>")],
        ),
        (
            TOOLS,
            [(U, "a"), (A, "f()"), (T, "1"), (A, "One")],
            [
                ("<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "f()<|im_end|>"),
                (
                    "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nf()<|im_end|>\n"
                    "<|im_start|>tool\n1<|im_end|><|im_start|>assistant\n",
                    "One<|im_end|>",
                ),
            ],
        ),
        (
            CLOSED,
            [(U, "a"), (A, "b")],
            [
                (
                    "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant<|eot_id|>\n",
                    "</think>b<|im_end|>",
                )
            ],
        ),
    ],
    ids=["a prompt that thinks", "thoughts dropped", "system last", "tools", "closed thoughts"],
)
def test_a_turn_is_trained_behind_the_prompt_that_the_model_meets(template, turns, expected):
    tokenizer = tokenizer_of(template)
    rows = encode(chat(*turns), tokenizer, 1000)
    assert shown(rows, tokenizer) == expected
    # The prompt is the one that generation is handed, id by id.
    for row, upto in zip(rows, [i for i, turn in enumerate(turns) if turn[0] == A], strict=True):
        before = chat_ids(chat(*turns[:upto]).content["messages"], tokenizer)
        learnt = next(i for i, label in enumerate(row.labels) if label != -100)
        assert row.input_ids[:learnt] == before
        assert row.labels[-2 if row.labels[-1] == -100 else -1] in turn_ends(tokenizer)


def test_what_a_template_writes_behind_every_chat_is_not_learnt():
    # Command R's tool template ends every chat with an instruction, behind an answer too.
    template = (
        "{% for m in messages %}" + TURN + "{% endfor %}{{ '<|im_start|>system\n' + "
        "'Write JSON.<|im_end|>\n' }}" + HEADER
    )
    with pytest.raises(TokenizerError, match=r"rows.jsonl:1: .*its place cannot be told"):
        encode(chat((U, "a"), (A, "b")), tokenizer_of(template), 1000)


# A turn has no end of its own, and thoughts of earlier ones are taken out, as GLM writes chats.
GLM = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>\n' }}"
    "{% if loop.last and m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% else %}{{ {'user': '<|eot_id|>', 'tool': '<|end_header_id|>'}[m.role] + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def test_a_turn_without_an_end_ends_where_the_next_message_begins():
    tokenizer = tokenizer_of(GLM)
    (row,) = encode(chat((U, "a"), (A, "b"), (U, "c"), (A, "d")), tokenizer, 1000)
    learnt = [tokenizer.decode([label]) for label in row.labels if label != -100]
    assert learnt == ["\n", "b", "<|eot_id|>", "\n", "d", "<|eot_id|>"]
    last = chat((U, "a"), (A, "b"), (T, "c"), (A, "d"))
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    last.content["messages"][1]["tool_calls"] = [call]
    last.content["messages"][3]["reasoning_content"] = "e"
    (row,) = encode(last, tokenizer, 1000)
    (_, text) = shown([row], tokenizer)[0]
    assert text == '\nb{"name": "f", "arguments": {}}<|end_header_id|>\n(e)d<|eot_id|>'
    # Where each turn is a row, for its thoughts are not in the others.
    each = chat((U, "a"), (A, "b"), (U, "c"), (A, "d"))
    for place in (1, 3):
        each.content["messages"][place]["reasoning_content"] = "e"
    found = shown(encode(each, tokenizer, 1000), tokenizer)
    assert [text for _, text in found] == ["\n(e)b<|eot_id|>", "\n(e)d<|eot_id|>"]
    ends = ("<|eot_id|>", "<|end_header_id|>")
    assert turn_ends(tokenizer) == {*map(tokenizer.convert_tokens_to_ids, ends)}


@pytest.mark.parametrize("end", ["\n", " ", "}"])
def test_answers_do_not_stop_at_what_is_no_control_token(end):
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.role + ':' + m.content + '" + repr(end)[1:-1] + "' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    if end == "\n":  # as Gemma's vocabulary adds it
        tokenizer.add_tokens([AddedToken(end)])
    assert turn_ends(tokenizer) == frozenset()
    assert "EOS only, which is not learnt" in ends_text(tokenizer, ChatOptions())


def test_the_start_of_a_text_is_no_end_of_a_turn_before_it():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ bos_token + '[' + m.content + ']' if m.role == 'user' "
        "else m.content }}{% endfor %}"
    )
    (row,) = encode(chat((U, "a"), (A, "b"), (U, "c"), (A, "d")), tokenizer, 1000)
    assert shown([row], tokenizer)[0][1] == "bd"
    assert turn_ends(tokenizer) == frozenset()


def test_a_line_end_that_is_marked_behind_the_end_is_not_the_end():
    # As TRL's templates for training have it.
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% endfor %}" + HEADER
    )
    assert turn_ends(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_an_end_that_is_added_and_not_special_is_the_end():
    tokenizer = tokenizer_of(
        "{% for m in messages %}" + TURN.replace("|im_", "|own_") + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|own_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.add_tokens([AddedToken(f"<|own_{name}|>") for name in ("start", "end")])
    (row,) = encode(chat((U, "a"), (A, "b\nb"), (U, "c"), (A, "d")), tokenizer, 1000)
    assert shown([row], tokenizer)[0][1] == "b\nb<|own_end|>d<|own_end|>"
    assert turn_ends(tokenizer) == {tokenizer.convert_tokens_to_ids("<|own_end|>")}


def test_a_tools_answer_that_is_left_out_is_missed_where_an_answer_says_it_again():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}" + TURN + "{% endif %}{% endfor %}"
    ) + HEADER
    row = chat((U, "How warm?"), (A, "weather()"), (T, "22"), (A, "It is 22 degrees."))
    found = encode(row, tokenizer_of(template), 1000)
    assert isinstance(found, Skipped)
    assert found.reason == LEFT_OUT


def test_what_is_learnt_is_the_union_of_the_marks():
    tokenizer = tokenizer_of(MARKS)
    messages = [(U, "a"), (A, "b"), (U, "c"), (A, "d")]
    (row,) = encode(chat(*messages), tokenizer, 1000)
    upstream = tokenizer.apply_chat_template(
        chat(*messages).content["messages"],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert row.input_ids[1:] == upstream["input_ids"]
    assert [label != -100 for label in row.labels[1:]] == [
        mask == 1 for mask in upstream["assistant_masks"]
    ]
    (row,) = encode(chat(*messages, m1=0), tokenizer, 1000)
    assert tokenizer.decode([label for label in row.labels if label != -100]) == "d<|im_end|></s>"


def test_only_the_last_turn_is_trained_on_where_that_is_asked():
    tokenizer = tokenizer_of("{% for m in messages %}" + TURN + "{% endfor %}" + HEADER)
    row = chat((U, "a"), (A, "b"), (U, "c"), (A, "d"))
    rows = encode(row, tokenizer, 1000, EncodeRules(chat=ChatOptions(train_on="last")))
    assert [learnt for _, learnt in shown(rows, tokenizer)] == ["d<|im_end|>"]
    rows = encode(row, tokenizer, 1000)
    assert [learnt for _, learnt in shown(rows, tokenizer)] == ["b<|im_end|>d<|im_end|>"]


@pytest.mark.parametrize("refuses", [True, False])
def test_a_system_text_that_a_template_does_not_take_stands_with_the_first_user(refuses):
    what = "{{ raise_exception('no system') }}" if refuses else ""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + what + "{% else %}" + TURN + ""
        "{% endif %}{% endfor %}" + HEADER
    )
    tokenizer = tokenizer_of(template)
    row = chat((S, "Be brief."), (U, "a"), (A, "b"))
    if refuses:
        with pytest.raises(DataError, match="no system; give --merge_system"):
            encode(row, tokenizer, 1000)
    else:
        assert isinstance(encode(row, tokenizer, 1000), Skipped)
    merged = EncodeRules(chat=ChatOptions(merge_system=True))
    (found,) = encode(row, tokenizer, 1000, merged)
    plain = chat((U, "Be brief.\n\na"), (A, "b"))
    assert [found] == encode(plain, tokenizer, 1000)
    # A template that takes one gets it as it is.
    takes = tokenizer_of("{% for m in messages %}" + TURN + "{% endfor %}" + HEADER)
    assert encode(row, takes, 1000, merged) == encode(row, takes, 1000)


def spaced(kind):
    """Tokenizers that put a space before a text, as SentencePiece's and GPT-2's do."""
    alphabet = ["▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    if kind == "add_prefix_space":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    if kind == "add_prefix_space":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
    else:
        if kind == "prepend":
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        made.decoder = sentencepiece_decoder()
    made.add_special_tokens([AddedToken(word, special=True) for word in words[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "add_prefix_space"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Q: who?\nA:", " Lily"),
        ("### Response:\n", "Lily"),
        ("def f():\n", "    return 1"),
        ('{"name": "', 'Lily"}'),
        ("a ", " b"),
        ("a", "\n\nb"),
        ("é", "🙂 ü"),
        ("a", ""),
    ],
)
def test_the_ids_of_a_row_decode_to_its_prompt_and_completion(kind, prompt, completion):
    tokenizer = spaced(kind)
    (row,) = encode(
        Row({"prompt": prompt, "completion": completion}, "rows.jsonl", 1), tokenizer, 1000
    )
    before = prompt_ids(prompt, tokenizer)
    assert row.input_ids[: len(before)] == before
    text = tokenizer.decode(row.input_ids, skip_special_tokens=True)
    # GPT-2's space before the first word is a part of the text that it stands for.
    assert text.removeprefix(" " if kind == "add_prefix_space" else "") == prompt + completion


def test_a_tokenizer_that_panics_on_a_text_is_named():
    tokenizer = chat_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    row = Row({"prompt": "x" * 3000, "completion": "ok"}, "rows.jsonl", 1)
    with pytest.raises(TokenizerError, match=r"the tokenizer fails on a text: .*retry-limit"):
        encode(row, tokenizer, 10_000)


def test_thoughts_reach_a_template_that_looks_for_them_in_the_text():
    tokenizer = tokenizer_of(R1)
    row = chat((U, "2"), (A, "4"))
    row.content["messages"][1]["reasoning_content"] = "hm"
    assert shown(encode(row, tokenizer, 1000), tokenizer) == [
        ("<s><|user|>2<|im_start|><think>\n", "hm\n</think>\n\n4<|im_end|>")
    ]
