"""A byte-level BPE tokenizer with the control tokens of all of the project's templates."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CONTROL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
MERGES = [("Ġ", "h"), ("h", "e"), ("l", "l"), ("Ċ", "Ċ"), (":", "Ċ"), ("<", "|"), ("|", ">")]


def sentencepiece_decoder():
    """As Llama 2's: `▁` is a space, unknown characters are bytes, the first space is dropped."""
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def chat_tokenizer(pad=None, adds_bos=True):
    """With `<s>` before a text or not; `</s>` ends a text; `pad` may be the same or None."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*CONTROL, *alphabet, *("".join(pair) for pair in MERGES)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocab, MERGES))
    # Splits as GPT-2 does, so that a line end is no part of a word.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in CONTROL])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad
    )
