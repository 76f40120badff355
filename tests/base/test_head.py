"""Laws of the output head in 4 and 8 bits: a linear like the others, multiplied tile by tile."""

from __future__ import annotations

import pytest
import torch
from families import relative_error, save_checkpoint, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_kit.base import head as heads
from qlora_kit.base.head import QuantizedHead
from qlora_kit.base.linear import dequantize, quantize_linear
from qlora_kit.base.load import load_base
from qlora_kit.base.quantize import Quantization
from qlora_kit.generation.decode import generate_ids
from qlora_kit.kernels import cross_entropy
from qlora_kit.kernels.cross_entropy import cross_entropy_sum
from qlora_kit.memory.counter import StorageCounter

FORMS = [
    Quantization(4, "nf4", True),
    Quantization(4, "nf4", False),
    Quantization(4, "fp4", True),
    Quantization(8),
]
VOCABULARY, WIDTH = 777, 96  # no whole number of blocks, and of scales neither
BY_HALF = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}  # X3 and X23


def head_of(form, dtype=torch.float32, tile=heads.TILE, bias=False):
    """A quantized head of random weights, in tiles of at most so many entries."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul(0.3).to(dtype)
    made = torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(heads, "TILE", tile)
        return QuantizedHead(quantize_linear(weight, made, form))


def loss_of(head, dtype, count=300, softcap=None, scale=1.0):
    """The chunked loss and its gradient by the tokens."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (count,), generator=generator)
    loss = cross_entropy_sum(tokens, head, targets, softcap, scale)
    loss.backward()
    return loss.detach(), tokens.grad, tokens.detach(), targets


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "softcap", "bias"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, 3.0, False),
        (torch.float16, None, False),
    ],
)
def test_the_loss_is_that_of_the_dequantized_head(form, dtype, softcap, bias, monkeypatch):
    """Against all logits in fp64 of the weight dequantized to the compute dtype, two chunks."""
    monkeypatch.setattr(cross_entropy, "TILED_TOKENS", 256)
    head = head_of(form, dtype, 2**14, bias)
    loss, gradient, tokens, targets = loss_of(head, dtype, softcap=softcap, scale=0.7)
    exact = tokens.double().requires_grad_()
    logits = exact @ dequantize(head, dtype).double().t()
    logits = 0.7 * (logits if head.bias is None else logits + head.bias.double())
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=BY_HALF[dtype])
    error = (gradient.double() - exact.grad).norm() / exact.grad.norm()
    # In fp16 a gradient is rounded once more for each tile.
    assert error < BY_HALF[dtype] * (1 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tiles_of_any_size_are_the_rows_of_the_head(form):
    """What they decode is the head's own, bit for bit; the loss differs by the order of sums."""
    whole = head_of(form)
    assert len(whole.tiles) == 1
    expected, gradient, *_ = loss_of(whole, torch.float32)
    weight = dequantize(whole, torch.float32)
    for tile in (1, 2**14, 2**15, 50_000, VOCABULARY * WIDTH):
        head = head_of(form, tile=tile)
        assert [rows.start for rows, _ in head.tiles[1:]] == [r.stop for r, _ in head.tiles[:-1]]
        parts = [part.dequantize(torch.float32) for _, part in head.tiles]
        assert torch.equal(torch.cat(parts), weight)
        loss, found, *_ = loss_of(head, torch.float32)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        assert relative_error(found, gradient) < 1e-6
    assert len(head_of(form, tile=2**14).tiles) > 1


@pytest.mark.parametrize("form", FORMS[::3], ids=str)
def test_a_head_that_is_called_gives_logits_and_takes_gradients(form):
    head = head_of(form, tile=2**14, bias=True)
    tokens = torch.randn(2, 5, WIDTH, requires_grad=True)
    logits = head(tokens)
    weight = dequantize(head, torch.float32)
    assert relative_error(logits, tokens.double() @ weight.double().t() + head.bias.double()) < 1e-6
    (3 * logits).sum().backward()
    assert relative_error(tokens.grad, (3 * weight).sum(0).expand_as(tokens)) < 1e-5


@pytest.mark.parametrize("vocabulary", [2**12, 2**17])
def test_logits_take_a_fixed_number_of_bytes(vocabulary):
    """A chunk in 16 bits and some of its tokens in fp32, however many tokens and whatever V."""
    width, count = 16, 700
    tokens = torch.randn(count, width).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width).bfloat16()
    dense = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    most = {
        dense: cross_entropy.CHUNK_BYTES,
        QuantizedHead(quantize_linear(weight, None, FORMS[0])): cross_entropy.TILED_BYTES,
    }
    for head, nbytes in most.items():
        with StorageCounter(head) as counter:
            counter.tag("given", (tokens,))
            known = counter.current
            cross_entropy_sum(tokens, head, torch.zeros(count, dtype=torch.int64))
        # Beside them the decoded head, which is small here, the logits of a tile, and what is as
        # large as the tokens.
        beside = 4 * vocabulary * width + 2 * count * heads.ROWS + 16 * tokens.nbytes
        assert counter.peak - known <= nbytes + cross_entropy.WIDE_BYTES + beside


@pytest.mark.parametrize("family", ["llama2", "gemma2", "qwen2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_head_is_quantized_and_the_embedding_exact(tmp_path, family, bits):
    """Tied or not, the head's bytes are those of its own weight; the embedding is the files'."""
    save_checkpoint(tmp_path, family)
    base = load_base(str(tmp_path), bits=4, head_bits=bits, dtype="fp32", device="cpu")
    model, files = base.model, load_file(tmp_path / "model.safetensors")
    embedding = files["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    source = files.get("lm_head.weight", embedding)
    assert base.is_tied is ("lm_head.weight" not in files)
    form = Quantization(4, "nf4", True) if bits == 4 else Quantization(8)
    expected = dequantize(quantize_linear(source, None, form), torch.float32)
    assert torch.equal(dequantize(model.lm_head, torch.float32), expected)
    assert not torch.equal(expected, source)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(dequantize(model.get_submodule(name), torch.float32))
        plain.get_input_embeddings().weight = nn.Parameter(embedding)
        ids = token_ids()
        assert relative_error(model(ids).logits, plain.eval()(ids).logits) < 1e-5


def test_a_quantized_head_generates(tmp_path):
    save_checkpoint(tmp_path, "qwen2")
    base = load_base(str(tmp_path), bits=4, head_bits=4, dtype="fp32", device="cpu")
    ids = token_ids(1, 6)
    with torch.no_grad():
        following = int(base.model(ids).logits[0, -1].argmax())
    prompts = [ids[0].tolist()]
    steps = generate_ids(base.model, prompts, max_new_tokens=2, eos_ids=(), pad_id=0)
    assert next(steps) == [following]
    steps.close()
