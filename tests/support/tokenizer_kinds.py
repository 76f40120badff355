"""A tokenizer of each kind, with the splits of real ones and a vocabulary of hundreds.

Regular expressions are spelled as the tokenizer.json files of the models have them.
"""

import json

from texts import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FIRST, SECOND = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}{a}{LOWER}{b}" for a, b in ("*+", "+*"))
BEHIND = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": [],
    "smollm": [],
    "llama-bpe": [rf"{WORDS}\p{{N}}{{1,3}}|{REST}"],
    "dbrx": [rf"{WORDS}\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{WORDS}\p{{N}}|{REST}"],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [rf"{FIRST}|{SECOND}|\p{{N}}|{SLASHES}"],
    "gpt-4o": [rf"{FIRST}{BEHIND}|{SECOND}{BEHIND}|\p{{N}}{{1,3}}|{SLASHES}"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_WORDS],
}
"""By llama.cpp's name; what comes before the bytes."""
IGNORE_MERGES = ("llama-bpe", "tekken")
NFC = ("qwen2", "qwen35")
NO_BOS = ("qwen2", "qwen35", "gpt-2")
CONTROL = ["<s>", "</s>", "<|im_end|>", "<unk>"]
VOCABULARY = 700
UNSEEN = ("control strings", "a word of its own")
CORPUS = [text for name, text in TEXTS.items() if name not in UNSEEN]
CORPUS = [*CORPUS, "the quick brown fox, 'tis there's 1234567890 " * 3] * 3


def byte_level(kind):
    """A tokenizer that llama.cpp has under the name `kind`."""
    backend = Tokenizer(models.BPE(ignore_merges=kind in IGNORE_MERGES))
    steps = [pre.Split(Regex(split), "isolated") for split in SPLITS[kind]]
    if kind == "smollm":
        steps = [pre.Digits(individual_digits=True)]
    regex = kind in ("gpt-2", "smollm")
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=regex))
    backend.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    if kind in NFC:
        backend.normalizer = normalizers.NFC()
    alphabet = pre.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=alphabet,
            special_tokens=CONTROL,
            show_progress=False,
        ),
    )
    thoughts = AddedToken("<think>", special=False, normalized=False)
    backend = with_word(backend, *(["Ġunmergeable"] if kind in IGNORE_MERGES else []))
    return _finished(backend, kind not in NO_BOS, [thoughts])


def with_word(backend, *words):
    """With words in the vocabulary that no merges lead to."""
    described = json.loads(backend.to_str())
    known = described["model"]["vocab"]
    known |= {word: len(known) + number for number, word in enumerate(words)}
    return Tokenizer.from_str(json.dumps(described))


SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ADDED = {
    "llama-2": [],
    "metaspace": [AddedToken("[INST]", special=True)],
    "gemma": [
        *(AddedToken(text, normalized=False) for text in ("\n", "\n\n", "▁▁", "▁▁▁", "<table>")),
        AddedToken("<start_of_turn>", special=True),
    ],
    "phi-3": [
        AddedToken("</s>", rstrip=True, normalized=False),
        AddedToken("<|endoftext|>", special=True),
        AddedToken("<|end|>", special=True, rstrip=True),
        AddedToken("<|im_end|>", special=True, rstrip=True),
        AddedToken("<|user|>", special=True, rstrip=True),
    ],
}
"""Sentencepiece's kinds; tokens beside the vocabulary's."""


def sentencepiece(kind):
    """A tokenizer that was made of sentencepiece's vocabulary, as transformers makes it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    inner = [text for text in ("\n\n", "▁▁", "▁▁▁", "\n") if kind == "gemma"]
    trained.train_from_iterator(
        [f" {text}" for text in CORPUS],
        trainers.BpeTrainer(vocab_size=VOCABULARY, max_token_length=12, show_progress=False),
    )
    learnt = sorted(
        trained.get_vocab(), key=lambda text: (len(text) == 1, trained.token_to_id(text))
    )
    words = [*CONTROL[3:], *CONTROL[:3], *BYTES, *inner, *learnt]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(words))}
    plain = {text: -float(number) for text, number in vocabulary.items() if text not in BYTES}
    merges = generate_merges(
        {text: vocabulary[text] for text in plain}, plain, skip_tokens=[*CONTROL]
    )
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", SPACE)
    if kind == "metaspace":
        backend.pre_tokenizer = pre.Metaspace(SPACE, prepend_scheme="first", split=False)
    elif kind == "gemma":
        backend.normalizer = replace
        backend.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return _finished(backend, True, ADDED[kind])


def _finished(backend, adds_bos, added=()):
    special = [AddedToken(word, special=True) for word in CONTROL]
    added = [*added, *(one for one in special if one.content not in {a.content for a in added})]
    backend.add_special_tokens([one for one in added if one.special])
    backend.add_tokens([one for one in added if not one.special])
    if adds_bos:
        number = backend.token_to_id("<s>")
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
