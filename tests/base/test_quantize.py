"""Laws of the quantized linears against bitsandbytes' own bytes and matmuls in double.

Those that hold on any device are in `device_laws.py`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref

import bitsandbytes as bnb
import bitsandbytes.functional as bf
import pytest
import torch
from adapted import adapted_model
from allocations import profiled_peak
from bitsandbytes import cextension
from device_laws import (
    DTYPES,
    FORMATS,
    PRODUCT_TOLERANCE,
    SHAPES,
    check_bytes,
    check_dequantized,
    check_products,
    decode,
    random_weight,
)
from families import tiny_model, token_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_kit.base import quantize
from qlora_kit.base.encode_weight import BLOCKSIZE, ENCODED_AT_ONCE
from qlora_kit.base.linear import (
    base_grad_input,
    base_matmul,
    dequantize,
    quantize_linear,
)
from qlora_kit.base.quantize import Quantization, check_library, decoding, fused_matmul
from qlora_kit.base.tagged import quantized_tensors
from qlora_kit.device.target import planned_device, processor_with
from qlora_kit.errors import NumericError, ResourceError
from qlora_kit.kernels.workspace import own_workspace

# bitsandbytes' library for CUDA, which it takes where torch sees a card, has no such code at all.
HAS_AVX512 = (
    "AVX512" in torch.backends.cpu.get_cpu_capability() and not cextension.lib.compiled_with_cuda
)


class Made(TorchDispatchMode):
    """Keeps what every operation gives, so that no address comes twice."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.results.append(result)
        return result

    def of_size(self, numel):
        """The floating tensors with at least that many elements."""
        tensors = (one for one in self.results if isinstance(one, torch.Tensor))
        return [one for one in tensors if one.numel() >= numel and one.is_floating_point()]


def upstream_4bit(weight):
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def upstream_8bit(weight):
    layer = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False
    )
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").train()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_scales_and_maps_are_bitsandbytes_own(form, shape, dtype):
    check_bytes(form, shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_dequantized_weight_is_table_times_scale_rounded_once(form, shape, dtype):
    check_dequantized(form, shape, dtype, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_in_double_it_is_what_fp32_holds(form, shape):
    layer = quantize_linear(random_weight(shape), None, form)
    double = dequantize(layer, torch.float64)
    assert double.dtype is torch.float64
    single = dequantize(layer, torch.float32).double()
    # In 8 bits the product of row and scale is rounded to double, in 4 bits to fp32.
    assert torch.allclose(double, single, rtol=torch.finfo(torch.float32).eps, atol=0)
    assert form.bits == 8 or torch.equal(double, single)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [*FORMATS, Quantization(16)])
def test_matmul_and_its_gradient_equal_double_precision(form, shape, dtype, bias):
    check_products(form, shape, dtype, bias, "cpu")


@pytest.mark.parametrize("form", FORMATS)
def test_autograd_of_a_quantized_layer_is_grad_input(form):
    layer = quantize_linear(random_weight((40, 72)), random_weight((40,), seed=1), form)
    x = random_weight((3, 72), seed=2).requires_grad_()
    grad = random_weight((3, 40), seed=3)
    layer(x).backward(grad)
    assert torch.equal(x.grad, base_grad_input(layer, grad))
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("quant_type", "mean", "sigma"), [("nf4", 0.072798, 7.4e-5), ("fp4", 0.096543, 1.11e-4)]
)
def test_round_trip_of_a_normal_weight_has_the_published_error(quant_type, mean, sigma):
    # bitsandbytes publishes the mean absolute error on N(0, 1), blocksize 64, and its spread.
    weight = random_weight((1024, 1024), seed=11)
    layer = quantize_linear(weight, None, Quantization(4, quant_type, False))
    error = float((dequantize(layer, torch.float32) - weight).abs().mean())
    assert abs(error - mean) < 7 * sigma


def test_bytes_of_a_layer_are_those_that_the_formats_say():
    numel, blocks = 130 * 33, math.ceil(130 * 33 / 64)
    sizes = {
        Quantization(4, "nf4", False): math.ceil(numel / 2) + 4 * blocks,
        Quantization(4, "nf4", True): math.ceil(numel / 2)
        + blocks
        + 4 * math.ceil(blocks / 256)
        + 4,
        Quantization(8): numel + 4 * 130,
    }
    for form, size in sizes.items():
        layer = quantize_linear(random_weight((130, 33)), None, form)
        assert sum(tensor.nbytes for tensor in quantized_tensors(layer)) == size
    assert quantized_tensors(torch.nn.Linear(4, 4)) == []


def test_double_quant_is_exact_over_several_groups_of_scales():
    form = Quantization(4, "nf4", True)
    layer = quantize_linear(random_weight((300, 173)), None, form)
    assert layer.nested_absmax.numel() > 3
    assert torch.allclose(dequantize(layer, torch.float32), decode(layer, form), rtol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_what_counts_is_the_numbers_that_were_quantized_not_their_dtype(form):
    weight = random_weight((32, 64), torch.bfloat16)
    assert torch.equal(weight.half().bfloat16(), weight)
    first, *others = (quantize_linear(weight.to(dtype), None, form) for dtype in DTYPES)
    held = first.state_dict()
    for layer in others:
        assert all(torch.equal(held[name], one) for name, one in layer.state_dict().items())
    for dtype in DTYPES:
        x, grad = random_weight((3, 64), dtype, 1), random_weight((3, 32), dtype, 2)
        for layer in others:
            assert torch.equal(base_matmul(layer, x), base_matmul(first, x))
            assert torch.equal(base_grad_input(layer, grad), base_grad_input(first, grad))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmuls_share_one_workspace_that_grows_once(dtype, native):
    """One of the dtype; where the processor has no instructions for it, one more that is fp32."""
    # From the smallest to the largest; each is larger than all that comes out of a matmul.
    layers = [
        quantize_linear(random_weight(shape), None, form)
        for shape, form in (
            ((48, 64), FORMATS[0]),
            ((64, 96), FORMATS[-1]),
            ((96, 130), FORMATS[1]),
        )
    ]
    inputs = [
        (random_weight((3, one.in_features), dtype), random_weight((3, one.out_features), dtype))
        for one in layers
    ]
    held = {}

    def multiply(index):
        x, grad = inputs[index]
        return base_matmul(layers[index], x), base_grad_input(layers[index], grad)

    with own_workspace(held), processor_with(*[dtype] * native):
        expected = [multiply(index) for index in range(3)]
        spaces = dict(held)
        assert held.keys() == ({dtype} if native else {dtype, torch.float32})
        assert {space.numel() for space in spaces.values()} == {96 * 130}
        with Made() as made:
            again = [multiply(index) for index in (0, 2, 1, 0)]
        assert all(held[kind] is space for kind, space in spaces.items())
    dense = made.of_size(layers[0].weight.numel())
    assert dense
    places = {space.data_ptr() for space in spaces.values()}
    assert {one.untyped_storage().data_ptr() for one in dense} == places
    for index, found in zip((0, 2, 1, 0), again, strict=True):
        assert all(
            torch.equal(one, other) for one, other in zip(found, expected[index], strict=True)
        )


# Traps of bitsandbytes 0.50. Each shows first that the usual way still fails: when that part turns
# red, the way around it is no longer needed.


@pytest.mark.skipif(not HAS_AVX512, reason="needs AVX512, of the CPU and in the library")
def test_rows_that_are_no_multiple_of_a_block_decode_right():
    weight = random_weight((64, 96))
    packed, state = bf.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    upstream = bf.dequantize_4bit(packed, state)
    assert (upstream - weight).norm() / weight.norm() > 0.15
    ours = dequantize(quantize_linear(weight, None, Quantization(4, "nf4", False)), torch.float32)
    assert (ours - weight).norm() / weight.norm() < 0.1


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_evaluation_without_gradients_does_not_repack_the_weight():
    weight, x = random_weight((64, 64), torch.bfloat16), random_weight((3, 64), torch.bfloat16)
    upstream = upstream_4bit(weight).eval()
    before = upstream.weight.data.clone()
    with torch.no_grad():
        upstream(x)
    assert upstream.weight.data.shape != before.shape  # repacked in place

    layer = quantize_linear(weight, None, Quantization(4, "nf4", True)).eval()
    held = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        layer(x)
    assert all(torch.equal(held[name], tensor) for name, tensor in layer.state_dict().items())


def around_an_evaluation(model):
    """Loss and adapter gradients of the same step before and after an evaluation."""
    ids, results = token_ids(2, 11), []
    for _ in range(2):
        model.train().zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients))
        with torch.no_grad():
            model.eval()(input_ids=ids)
    return results


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_alike_after_an_evaluation(dtype, bits, own):
    model = adapted_model(dtype=dtype, bits=bits, own=own, targets="all-linear")
    (loss, gradients), (later, again) = around_an_evaluation(model)
    assert torch.equal(later, loss)
    assert len(gradients) == 28
    assert all(torch.equal(again[name], one) for name, one in gradients.items())


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_bitsandbytes_own_layers_train_wrong_after_an_evaluation():
    from peft import LoraConfig, get_peft_model

    # Widths that are multiples of a block: there bitsandbytes decodes right.
    model = tiny_model(dtype=torch.bfloat16, intermediate_size=192)
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.base_model.set_submodule(name, upstream_4bit(module.weight.data))
    model.is_loaded_in_4bit = True  # what PEFT asks
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    (loss, gradients), (later, again) = around_an_evaluation(get_peft_model(model, lora))
    # The loss hides it: the same but for rounding.
    assert float(later) == pytest.approx(float(loss), rel=PRODUCT_TOLERANCE[torch.bfloat16])
    errors = [float((again[n] - one).norm() / one.norm()) for n, one in gradients.items()]
    # Right are only the two that no repacked layer lies above: those of the last down_proj.
    assert len(errors) == 28
    assert sum(error > 0.5 for error in errors) == 26


def test_8bit_inputs_are_freed_under_checkpointing():
    weight, x = random_weight((64, 64)), random_weight((4, 64)).requires_grad_()
    upstream = upstream_8bit(weight)
    ours = quantize_linear(weight, None, Quantization(8))
    kept = {}

    def run(layer, name):
        def inner(x):
            hidden = x * 2.0
            kept[name] = weakref.ref(hidden)
            return layer(hidden)

        y = checkpoint(inner, x, use_reentrant=False)
        gc.collect()
        return y

    alive = [run(upstream, "upstream"), run(ours, "ours")]
    assert kept["upstream"]() is not None
    assert kept["ours"]() is None
    del alive


@pytest.fixture
def no_library(monkeypatch):
    """bitsandbytes as it is where its library for the torch that is here is missing."""
    said = "No compatible CUDA binary found at libbitsandbytes_cuda139.so"
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary(said))
    quantize.cpu_kernel.cache_clear()
    yield said
    quantize.cpu_kernel.cache_clear()


def test_a_library_that_is_not_there_is_said_before_a_weight_is_read(no_library):
    """bitsandbytes logs it when it is imported, and raises a RuntimeError at its first kernel."""
    assert cextension.lib.any_name_at_all is not None  # the trap: every name is there
    with pytest.raises(RuntimeError, match="native library"):
        cextension.lib.any_name_at_all()
    with pytest.raises(ResourceError, match="no library for this torch") as caught:
        check_library(torch.device("cuda"))
    assert no_library in caught.value.problem
    assert "python -m bitsandbytes" in caught.value.remedy
    check_library(torch.device("cpu"))


def test_without_a_library_the_cpu_decodes_by_torch_alone(no_library):
    layer = quantize_linear(random_weight((64, 96)), None, FORMATS[0])
    # The table times the scale in another order: an ulp of fp32.
    ours = dequantize(layer, torch.float32)
    assert torch.allclose(ours, decode(layer, FORMATS[0]), rtol=1e-6)


def test_8bit_refuses_what_bitsandbytes_turns_into_zeros():
    weight = random_weight((4, 64), torch.bfloat16)
    weight[1, 3] = 70000.0  # finite in bf16, infinite in fp16
    rows, _, _ = bf.int8_vectorwise_quant(weight.half())
    assert not rows[1].any()
    with pytest.raises(NumericError, match="down_proj holds 70144") as caught:
        quantize_linear(weight, None, Quantization(8), name="down_proj")
    assert "--bits 4 or 16" in caught.value.remedy


def test_matmuls_are_made_in_the_dtype_of_the_input_whatever_was_quantized():
    weight = random_weight((32, 64))
    grad = random_weight((3, 32), torch.bfloat16)

    def decoded_in_backward(layer):
        """The dtypes of all tensors as large as the weight."""
        y = layer(random_weight((3, 64), torch.bfloat16).requires_grad_())
        with own_workspace({}), Made() as made:
            y.backward(grad)
        return {one.dtype for one in made.of_size(weight.numel())}

    # bitsandbytes' backward dequantizes to the dtype that was quantized, and rounds that.
    upstream = upstream_4bit(weight)
    assert upstream.weight.quant_state.dtype is torch.float32
    assert decoded_in_backward(upstream) == {torch.float32, torch.bfloat16}
    assert decoded_in_backward(upstream_4bit(weight.bfloat16())) == {torch.bfloat16}
    layer = quantize_linear(weight, None, Quantization(4, "nf4", True))
    with processor_with(torch.bfloat16):  # without, they are made in fp32
        for form in FORMATS:
            assert decoded_in_backward(quantize_linear(weight, None, form)) == {torch.bfloat16}
        assert base_grad_input(layer, grad).dtype is torch.bfloat16
        assert torch.equal(base_grad_input(layer, grad), grad @ dequantize(layer, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_scales_fold_out_of_both_matmuls(dtype):
    # In 16 bits the scale never touches the weight, which the next test shows; in fp32 it does.
    layer = quantize_linear(random_weight((96, 80)), None, Quantization(8))
    x, grad = random_weight((5, 80), dtype, seed=1), random_weight((5, 96), dtype, seed=2)
    dense = bf.int8_vectorwise_dequant(layer.weight, layer.row_absmax)
    ours, references = (base_matmul(layer, x), base_grad_input(layer, grad)), []
    for rows, weight in ((x, dense.t()), (grad, dense)):
        references.append(rows.double() @ weight.double())
    if dtype is torch.float32:
        assert torch.allclose(ours[0], x @ dense.t(), rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours[1], grad @ dense, rtol=1e-5, atol=1e-5)
    for one, exact in zip(ours, references, strict=True):
        # bitsandbytes multiplies by a rounded 1/127: at most two ulp of fp32 apart.
        assert (one.double() - exact).norm() <= PRODUCT_TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 1), (torch.float16, 128)])
def test_8bit_matmuls_make_no_weight_but_the_whole_numbers(dtype, unit, native):
    """In the dtype, in its unit; in fp32, where no sum ends its range, as they are."""
    made_in, unit = (dtype, unit) if native else (torch.float32, 1)
    layer = quantize_linear(random_weight((96, 80)), random_weight((96,), dtype), Quantization(8))
    inputs = (
        (base_matmul, random_weight((5, 80), dtype)),
        (base_grad_input, random_weight((5, 96), dtype)),
    )
    for multiply, rows in inputs:
        held = {}
        with own_workspace(held), processor_with(*[dtype] * native), Made() as made:
            multiply(layer, rows)
        assert held.keys() == {made_in}
        assert torch.equal(held[made_in].view(96, 80) * unit, layer.weight.to(made_in))
        places = {one.untyped_storage().data_ptr() for one in made.of_size(layer.weight.numel())}
        assert places == {held[made_in].data_ptr()}


def test_8bit_matmuls_need_no_fp32_memory_of_the_size_of_the_weight():
    weight = random_weight((256, 512), torch.bfloat16)
    layers = {
        "upstream": upstream_8bit(weight),
        "ours": quantize_linear(weight, None, Quantization(8)),
    }
    x = random_weight((4, 512), torch.bfloat16).requires_grad_()
    for name, layer in layers.items():
        layer(x).sum().backward()  # the workspace is there from now on
        peak = profiled_peak(lambda layer=layer: layer(x).sum().backward())
        if name == "upstream":
            # A copy in bf16 that is scaled in place by fp32: torch makes fp32 of it and rounds.
            assert peak >= (2 + 4 + 4) * weight.numel()
        else:
            # With matrix tiles the library's product packs the weight again, in its 16 bits.
            assert peak < 3 * weight.numel()


@pytest.mark.parametrize("form", FORMATS)
def test_quantizing_makes_what_it_gives_and_copies_of_a_part(form):
    weight, given = random_weight((1024, 2048), torch.bfloat16), []
    quantize_linear(weight, None, form)  # what is made once
    peak = profiled_peak(lambda: given.append(quantize_linear(weight, None, form)))
    held = sum(tensor.nbytes for tensor in quantized_tensors(given[0]))
    # At most two copies in fp32, codes of 64 and of 8 bits, and the scales, quantized last.
    assert peak <= held + 32 * ENCODED_AT_ONCE + 16 * weight.numel() // BLOCKSIZE
    if form.bits == 8:
        whole = profiled_peak(lambda: bf.int8_vectorwise_quant(weight.half()))
        assert whole > held + 8 * weight.numel()


def test_odd_shapes_compile_nothing():
    asked = []

    def compiler(graph, inputs):
        asked.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.compiler.set_stance(force_backend=compiler):
        for form in FORMATS:
            for shape in SHAPES:
                layer = quantize_linear(random_weight(shape), None, form)
                for dtype in DTYPES:
                    x = random_weight((3, shape[1]), dtype).requires_grad_()
                    layer(x).sum().backward()
                    dequantize(layer, dtype)
        assert asked == []
        packed, state = bf.quantize_4bit(random_weight((5, 7)), blocksize=64, quant_type="nf4")
        bf.dequantize_4bit(packed, state)
    assert len(asked) == 1


@pytest.mark.parametrize("form", FORMATS[:4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_product_of_our_bytes_is_that_of_the_dequantized_weight(form, dtype):
    """bitsandbytes' operation on the buffers as they lie here, on the CPU."""
    bias = random_weight((33,), dtype, 2)
    layer = quantize_linear(random_weight((33, 192), dtype), bias, form)
    exact = dequantize(layer, dtype).double()
    held = layer.weight, (33, 192), form.quant_type, layer.absmax, layer._nested, bias
    for rows in ((1,), (4, 1), (1, 3), (9,)):
        x = random_weight((*rows, 192), dtype, 1)
        found = fused_matmul(x, *held)
        assert (found.shape, found.dtype) == ((*rows, 33), dtype)
        expected = x.double() @ exact.t() + bias.double()
        assert (found - expected).norm() <= PRODUCT_TOLERANCE[dtype] * expected.norm()
        assert (found - base_matmul(layer, x)).norm() <= PRODUCT_TOLERANCE[dtype] * found.norm()


def test_only_a_decoding_step_on_cuda_reads_the_packed_weight_itself():
    """And only where rows are whole blocks."""

    def made(features, kind, in_decoding):
        weight = torch.empty(40, features, dtype=torch.bfloat16)
        with (
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
            planned_device(kind),
            own_workspace({}),
        ):
            layer = quantize_linear(fake.from_tensor(weight), None, FORMATS[0])
            x = torch.empty(1, features, dtype=torch.bfloat16)
            with decoding() if in_decoding else contextlib.nullcontext(), Made() as seen:
                assert base_matmul(layer, x).shape == (1, 40)
        return bool(seen.of_size(weight.numel()))

    assert not made(192, "cuda", True)
    assert made(192, "cuda", False)
    assert made(192, "cpu", True)
    assert made(172, "cuda", True)
