"""Laws of decoding, on tiny random models, two tokenizers made here, and a real pretrained one."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from chat_tokenizer import sentencepiece_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from qlora_kit.config.generation import SamplingConfig
from qlora_kit.errors import ConfigError, NumericError
from qlora_kit.generation.decode import answers, end_ids, generate_ids
from qlora_kit.generation.sampling import Sampling
from qlora_kit.generation.sampling import nucleus as draw_nucleus
from qlora_kit.generation.text import AnswerText, added_text

VOCABULARY = 96
CONTEXT = 48
PROMPTS = [[5, 6, 7], [9] * 12, [20, 21, 22, 23, 24, 25, 26]]
TEXTS = [
    "plain words, 'twas it .",
    "héllo 你好 — 😀👩‍👩‍👧‍👦 ok",
    "😀",
    "  two spaces\n\tand a tab ",
    "a literal \ufffd inside",
]


@pytest.fixture(autouse=True)
def one_thread():
    # Matrices this small are slower on several.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(architecture: str = "llama") -> torch.nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if architecture == "gpt2":  # absolute positions: an offset shows, which a rotary model hides
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
        )
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    for parameter in model.parameters():
        # Larger than the default, so that the greedy path is not one token over and over.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def rows_of(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 16, "eos_ids": (), "pad_id": 0, **options}
    rows = [[] for _ in prompts]
    for step in generate_ids(model, prompts, **options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: each token is bytes, any cut can fall inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=True
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's kind: letters, and bytes for the rest; a space at the beginning is dropped."""
    known = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmno"]
    vocabulary = {token: index for index, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = sentencepiece_decoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_a_batch_equals_the_row_alone(architecture, attention):
    model = tiny_model(architecture)
    model.config._attn_implementation = attention
    batched = rows_of(model)
    assert batched == [rows_of(model, [prompt])[0] for prompt in PROMPTS]
    assert len({token for row in batched for token in row}) > 8, (
        "the model repeats itself: the comparison says little"
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_cached_steps_equal_the_full_forward(architecture):
    model = tiny_model(architecture).eval()
    for prompt, answer in zip(PROMPTS, rows_of(model), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_a_row_that_ends_leaves_the_others_as_they_were(model):
    whole = rows_of(model)
    # A token that only the first row draws, and not at once.
    end = next(token for token in whole[0][1:] if token not in whole[0][:1] + whole[1] + whole[2])
    cut = whole[0].index(end)
    assert rows_of(model, eos_ids={end}) == [whole[0][:cut], *whole[1:]]
    assert list(generate_ids(model, PROMPTS[:1], max_new_tokens=16, eos_ids={end}, pad_id=0)) == [
        [token] for token in whole[0][:cut]
    ]


def test_a_model_that_ends_at_once_yields_nothing(model):
    everything = range(VOCABULARY)
    assert rows_of(model, eos_ids=everything) == [[], [], []]
    assert rows_of(model, []) == []


def test_what_stands_in_the_padding_does_not_matter(model):
    assert rows_of(model, pad_id=0) == rows_of(model, pad_id=77)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(model):
    sampled = rows_of(model, temperature=1.5, seed=7)
    torch.manual_seed(123)
    assert sampled == rows_of(model, temperature=1.5, seed=7)
    assert sampled != rows_of(model, temperature=1.5, seed=8)
    assert sampled != rows_of(model)


def test_a_sampled_row_does_not_depend_on_the_rows_beside_it(model):
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    batched = rows_of(model, **options)
    assert batched == [rows_of(model, [prompt], **options)[0] for prompt in PROMPTS]


def test_global_random_state_is_left_alone(model):
    before = torch.get_rng_state()
    rows_of(model, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3, 1e-6])
def test_drawing_follows_the_nucleus(top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, -4.0])
    temperature = 0.7
    probabilities = (logits / temperature).softmax(-1)
    # The nucleus by its definition: add the likeliest until top_p is reached.
    nucleus = torch.zeros_like(probabilities)
    for token in probabilities.argsort(descending=True):
        if nucleus.sum() >= top_p:
            break
        nucleus[token] = probabilities[token]
    nucleus /= nucleus.sum()
    # Evenly spaced numbers instead of random ones: every share is exact to one part in `count`
    # for each of the two ends of a token's interval.
    count = 4000
    numbers = (torch.arange(count) + 0.5) / count
    drawn = [draw_nucleus(logits[None], temperature, top_p, number).item() for number in numbers]
    shares = torch.bincount(torch.tensor(drawn), minlength=6) / count
    assert torch.equal(shares > 0, nucleus > 2 / count)
    assert torch.allclose(shares, nucleus, atol=2 / count)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("temperature", [1e-38, 1.0, 100.0])
def test_the_ends_of_the_range_draw_a_token_of_the_nucleus(number, temperature):
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    number = torch.tensor(number)
    assert torch.equal(draw_nucleus(logits, temperature, 1e-6, number), logits.argmax(-1))
    drawn = draw_nucleus(logits, temperature, 1.0, number)
    assert ((drawn >= 0) & (drawn < 1000)).all()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    drawn = {draw_nucleus(logits, 1.0, 1.0, torch.tensor(n)).item() for n in (0.0, 0.5, 1 - 2**-24)}
    assert drawn == {1, 3}


def test_modes_come_back_module_by_module(model):
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    steps = generate_ids(model, PROMPTS, max_new_tokens=4, eos_ids=(), pad_id=0)
    assert [module.training for module in model.modules()] == before
    next(steps)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled(), "between two steps the caller's gradients are on"
    steps.close()
    assert [module.training for module in model.modules()] == before
    rows_of(model)
    assert [module.training for module in model.modules()] == before


def test_nothing_of_the_model_changes_and_it_trains_on_after():
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    rows_of(model, temperature=1.0)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(buffers[name], t) for name, t in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.tensor(PROMPTS[2:])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_context_is_a_limit_and_the_error_names_the_numbers(model):
    prompt = [[7] * 40]
    assert len(rows_of(model, prompt, max_new_tokens=8)[0]) == 8
    with pytest.raises(ConfigError, match=r"^the prompt has 40 .* 9 .* 48; give at most 8"):
        generate_ids(model, prompt, max_new_tokens=9, eos_ids=(), pad_id=0)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate_ids(model, [[7] * 48], max_new_tokens=1, eos_ids=(), pad_id=0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 96]], {}, "the prompt has the token 96, but the model has 96"),
        ([[1], [-1]], {}, "prompt 1 has the token -1"),
        ([[1]], {"pad_id": -1}, "padding token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -0.1}, "temperature must be"),
        ([[1]], {"top_p": 0.0}, "top_p must be"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(model, prompts, options, message):
    options = {"max_new_tokens": 4, "eos_ids": (), "pad_id": 0, **options}
    with pytest.raises(ConfigError, match=re.escape(message)):
        generate_ids(model, prompts, **options)


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_model().train()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericError, match="row 0 are not finite at new token 1"):
        rows_of(model)
    assert model.training


def stream_text(tokenizer, ids, *, after=()):
    """The pieces of an answer's text, as they come."""
    text = AnswerText(tokenizer, after=after)
    pieces = (text.push(token) for token in ids if token is not None)
    yield from filter(None, pieces)
    yield from filter(None, [text.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert whole.strip() == text.strip(), "the tokenizer lost something: the test would say little"
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == whole
    assert all(pieces)
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_pieces_come_as_soon_as_they_are_final(tokenizer):
    sent = []

    def ids():
        for token in tokenizer.encode("ab 😀c", add_special_tokens=False):
            sent.append(token)
            yield token

    at = {}
    for piece in stream_text(tokenizer, ids()):
        at[piece] = len(sent)
    assert at["b"] - at["a"] == 1
    assert len(sent) - min(at[piece] for piece in at if "😀" in piece) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_any_tokens_at_all_add_up_to_their_decoding(tokenizer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(tokenizer), (40,), generator=generator).tolist()
    if seed % 2:  # valid characters with a byte broken in between
        ids = tokenizer.encode("a你😀b好c" * 3, add_special_tokens=False)
        ids[seed % len(ids)] = ids[(seed * 7) % len(ids)]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream_text(tokenizer, ids)) == whole


def test_after_a_prompt_the_pieces_are_what_is_added(tokenizer):
    ids = tokenizer.encode("abc 你 def 😀", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    cuts = [cut for cut in range(len(ids)) if "\ufffd" not in tokenizer.decode(ids[:cut])]
    for cut in cuts:
        prompt = tokenizer.decode(ids[:cut])
        assert prompt + "".join(stream_text(tokenizer, ids[cut:], after=ids[:cut])) == whole
    assert len(cuts) > 5


def test_what_is_added_is_what_the_pieces_are(tokenizer):
    ids = tokenizer("é hello 😀 a b", add_special_tokens=False).input_ids
    for cut in range(len(ids)):
        pieces = stream_text(tokenizer, ids[cut:], after=ids[:cut])
        assert added_text(tokenizer, ids[cut:], ids[:cut]) == "".join(pieces)


def test_a_prompt_whose_last_bytes_are_spoilt_loses_no_text():
    tokenizer = byte_fallback()
    prompt = tokenizer.encode("a你", add_special_tokens=False)
    bad, *letters = tokenizer.convert_tokens_to_ids(["<0xFF>", "b", "c"])
    assert "".join(stream_text(tokenizer, [bad, *letters], after=prompt)).endswith("\ufffdbc")


def test_none_and_special_tokens_are_not_printed(tokenizer):
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert "".join(stream_text(tokenizer, [ids[0], None, *ids[1:], tokenizer.eos_token_id])) == (
        tokenizer.decode(ids)
    )
    assert list(stream_text(tokenizer, [])) == []


def test_texts_do_not_depend_on_how_they_are_batched():
    torch.manual_seed(0)
    tokenizer = byte_fallback()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.generation_config.eos_token_id = [1, 5]
    assert end_ids(model, tokenizer) == {1, 5}
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "o", "hi 你")]
    one = list(answers(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, batch_size=1))
    assert one == list(answers(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0))
    assert len(one) == 3
    each = list(answers(model, tokenizer, prompts, max_new_tokens=[2, 8, 5], batch_size=2))
    for prompt, limit, text in zip(prompts, [2, 8, 5], each, strict=True):
        assert [text] == list(answers(model, tokenizer, [prompt], max_new_tokens=limit))
    with pytest.raises(ConfigError, match="max_new_tokens has 2 values for 3 prompts"):
        answers(model, tokenizer, prompts, max_new_tokens=[2, 8])
    assert list(answers(model, tokenizer, [], max_new_tokens=8)) == []
    assert list(
        answers(model, tokenizer, prompts, max_new_tokens=8, eos_ids=range(len(tokenizer)))
    ) == ["", "", ""]
    with pytest.raises(ConfigError, match="prompt 2 is empty"):
        list(answers(model, tokenizer, [[5], [6], []], max_new_tokens=8, batch_size=1))


@pytest.mark.skipif("QLORA_KIT_DATA" not in os.environ, reason="QLORA_KIT_DATA is not set")
def test_the_greedy_text_of_stories260k_is_its_story():
    directory = Path(os.environ["QLORA_KIT_DATA"]) / "models" / "stories260K"
    notes = (directory / "stories260K.md").read_text(encoding="utf-8")
    [story] = re.findall(r"-t 0\.0\n(.*?)\n```", notes, flags=re.DOTALL)
    assert len(story) == 565
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    bos = tokenizer.bos_token_id
    # The story is cut where the program that printed it stops by default: after 256 tokens.
    options = {"max_new_tokens": 256, "eos_ids": end_ids(model, tokenizer)}
    assert list(answers(model, tokenizer, [[bos]], **options)) == [story]
    steps = generate_ids(model, [[bos]], pad_id=bos, **options)
    assert "".join(stream_text(tokenizer, (step[0] for step in steps))) == story


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 7}, {"temperature": 1.5}])
def test_what_was_there_is_penalised_as_transformers_does_it(model, settings):
    penalised = rows_of(model, repetition_penalty=1.7, **settings)
    for prompt, answer in zip(PROMPTS, penalised, strict=True):
        # Neither the rows beside it nor the padding count.
        assert rows_of(model, [prompt], repetition_penalty=1.7, **settings) == [answer]
        if not settings:
            ids = torch.tensor([prompt])
            plain = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
            theirs = model.generate(
                ids, repetition_penalty=1.7, attention_mask=torch.ones_like(ids), **plain
            )
            expected = theirs[0, len(prompt) :].tolist()
            assert answer == expected[: expected.index(2) if 2 in expected else None]
    assert penalised != rows_of(model, **settings)


def test_top_k_draws_from_the_likeliest(model):
    draw = Sampling(temperature=1.0, top_k=3, seed=1).drawer(PROMPTS, 60)
    torch.manual_seed(3)
    logits = torch.randn(3, VOCABULARY)
    best = logits.topk(3).indices
    drawn = torch.stack([draw(logits) for _ in range(60)])
    for row in range(3):
        assert set(drawn[:, row].tolist()) == set(best[row].tolist())
    assert rows_of(model, temperature=1.0, top_k=1) == rows_of(model)


def test_a_row_ends_where_its_stop_string_is_and_the_others_go_on(model):
    tokenizer = byte_fallback()
    asked = {"max_new_tokens": 16, "eos_ids": (), "batch_size": 3}
    whole = list(answers(model, tokenizer, PROMPTS, **asked))
    for row in range(3):
        assert len(whole[row]) > 4
        stop = whole[row][2:4]
        cut = list(answers(model, tokenizer, PROMPTS, stops=[stop, "never"], **asked))
        assert cut == [text.partition(stop)[0] for text in whole]


def test_tokens_are_drawn_as_the_options_say():
    assert Sampling.of(SamplingConfig()) == Sampling()
    said = {"temperature": 0.5, "top_p": 0.4, "top_k": 3, "repetition_penalty": 1.5, "seed": 7}
    assert Sampling.of(SamplingConfig(max_new_tokens=9, **said)) == Sampling(**said)
