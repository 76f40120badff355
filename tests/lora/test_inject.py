"""Laws of placing adapters in a whole model: which layers, what trains, what stays."""

from __future__ import annotations

import hashlib
import statistics

import pytest
import torch
from exact import adapter_gradients, exact_gradients, gradient_errors
from families import randomize_adapter, relative_error, save_checkpoint, token_ids
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.base.linear import dequantize
from qlora_kit.base.load import load_base
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.lora.dropout import KeyedDropout
from qlora_kit.lora.inject import (
    activate,
    adapter_names,
    find_targets,
    inject_lora,
    lora_layers,
    remove_adapter,
)
from qlora_kit.training.prepare import prepare_model

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, "llama_bias")
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    save_checkpoint(path, "llama3")
    return load(path)


def load(directory, bits=4, dtype="fp32"):
    return load_base(str(directory), bits=bits, dtype=dtype, device="cpu").model


@pytest.fixture(scope="module")
def plain(directory):
    """A model for questions about names, which no test changes."""
    return load(directory)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits


def base_hash(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def suffixes(names):
    return {name.rpartition(".")[2] for name in names}


# Which linears


def test_targets_by_keyword_name_and_regex(plain):
    assert suffixes(find_targets(plain, "auto")) == {"q_proj", "v_proj"}
    assert suffixes(find_targets(plain, "all-linear")) == LINEARS
    assert len(find_targets(plain, "all-linear")) == 2 * len(LINEARS)
    assert suffixes(find_targets(plain, "q_proj, up_proj")) == {"q_proj", "up_proj"}
    assert suffixes(find_targets(plain, ["o_proj"])) == {"o_proj"}
    one = "model.layers.1.self_attn.k_proj"
    assert find_targets(plain, one) == [one]
    assert find_targets(plain, r".*\.1\..*_proj") == [
        name for name in find_targets(plain, "all-linear") if ".1." in name
    ]


@pytest.mark.parametrize(
    "target", ["nope_proj", "q_proj,nope_proj", r".*nope.*", "proj", ["", "x"], "all_linear"]
)
def test_a_target_that_matches_nothing_lists_what_there_is(plain, target):
    with pytest.raises(ConfigError) as caught:
        inject_lora(plain, LoRAConfig(target_modules=target))
    listed = str(caught.value)
    assert all(f"{name} (2)" in listed for name in LINEARS)
    if target == "q_proj,nope_proj":
        assert "'nope_proj'" in listed
    assert ("did you mean all-linear?" in listed) == (target == "all_linear")
    assert not lora_layers(plain)


def test_a_regex_that_is_none_is_refused(plain):
    with pytest.raises(ConfigError, match="is not a regex"):
        find_targets(plain, "(q_proj")


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("lm_head", "lm_head"),
        ("q_proj,lm_head", "lm_head"),
        ("embed_tokens", "model.embed_tokens"),
        (r".*(q_proj|lm_head)", "lm_head"),
        (r".*embed.*", "model.embed_tokens"),
    ],
)
def test_the_head_and_the_embedding_carry_no_adapter(plain, tied, target, named):
    with pytest.raises(ConfigError, match=f"asks for {named}: the head and the embedding stay"):
        find_targets(plain, target)
    with pytest.raises(ConfigError, match=r"\(model.embed_tokens, lm_head\) share one tensor"):
        find_targets(tied, target)


def test_a_rank_above_every_dimension_is_refused_and_one_above_some_is_warned_of(directory):
    model = load(directory)
    with pytest.raises(ConfigError, match=r"lora_r 65 is above the largest dimension .* \(64\)"):
        inject_lora(model, LoRAConfig(r=65, target_modules="q_proj"))
    assert not lora_layers(model)
    with pytest.warns(UserWarning, match=r"above the smallest dimension of a target \(32\)"):
        inject_lora(model, LoRAConfig(r=40))


# What the swap does


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_injecting_changes_no_output_and_trains_the_adapter_alone(directory, bits, dtype):
    model = load(directory, bits, dtype)
    before, weights = logits(model), base_hash(model)
    inject_lora(model, LoRAConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert all(model.get_parameter(name).dtype is torch.float32 for name in trained)
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in trained
    randomize_adapter(model)
    assert not torch.equal(logits(model), before)
    activate(model, None)
    assert torch.equal(logits(model), before)
    assert weights == base_hash(unwrapped(model))


def unwrapped(model):
    """The model with its linears back in their places, to compare names and bytes."""
    for name, layer in lora_layers(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.base_layer)
    return model


def test_the_seed_alone_draws_the_adapter(directory):
    def drawn(seed):
        torch.rand(3)  # whatever the caller drew before
        model = inject_lora(load(directory), seed=seed)
        return torch.cat(
            [layer.weights("default")[0].flatten() for layer in lora_layers(model).values()]
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    state = torch.get_rng_state()
    inject_lora(load(directory))
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_adapters_seeds_no_device(directory, monkeypatch):
    """`torch.manual_seed` does, for good: a sampled answer would then depend on the adapter."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    assert seeded == [5]
    before = torch.get_rng_state()
    inject_lora(load_base(str(directory), bits=16, dtype="fp32").model, LoRAConfig(r=2), seed=7)
    assert seeded == [5]
    assert torch.equal(torch.get_rng_state(), before)


def test_injecting_again_replaces_the_adapter_everywhere(directory):
    model = inject_lora(load(directory), LoRAConfig(target_modules="all-linear"))
    randomize_adapter(model)
    inject_lora(model, LoRAConfig(target_modules="q_proj"))
    adapted = {name for name, layer in lora_layers(model).items() if "default" in layer.lora_A}
    assert suffixes(adapted) == {"q_proj"}
    assert torch.equal(logits(model), logits(load(directory)))


# Gradients of a whole model


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_adapter_gradients_equal_double_precision(data_dir, bits):
    directory = data_dir / "models" / "stories260K"
    model = inject_lora(load(directory, bits), LoRAConfig(r=4, target_modules="all-linear"))
    randomize_adapter(model, scale=0.02)
    ids = story(data_dir)
    loss(model.train(), ids).backward()
    exact = exact_gradients(model, lambda reference: loss(reference, ids))
    assert max(gradient_errors(adapter_gradients(model), exact)) <= 1e-5


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bf16_gradients_are_no_noisier_than_those_of_peft(data_dir, bits, prepared):
    # Five layers of bf16 activations put 5 % of noise on a gradient, whoever computes it. (A single
    # layer is held to 3e-2 in test_layer.py.)
    directory = data_dir / "models" / "stories260K"
    model = inject_lora(load(directory, bits, "bf16"), LoRAConfig(r=4, target_modules="all-linear"))
    if prepared:
        assert prepare_model(model, TrainingConfig(), "full") is None
    randomize_adapter(model, scale=0.02)
    ids = story(data_dir)
    loss(model.train(), ids).backward()

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for name, layer in lora_layers(model).items():
        base.get_submodule(name).weight.data = dequantize(layer.base_layer, torch.bfloat16)
    config = PeftConfig(r=4, lora_alpha=32, target_modules="all-linear")
    theirs = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    pairs = {}
    for name, layer in lora_layers(model).items():
        peft_layer = theirs.base_model.model.get_submodule(name)
        pairs[name] = (peft_layer.lora_A.default.weight, peft_layer.lora_B.default.weight)
        for weight, value in zip(pairs[name], layer.weights("default"), strict=True):
            weight.data.copy_(value.data)
    loss(theirs, ids).backward()
    peft_gradients = {name: [weight.grad for weight in pair] for name, pair in pairs.items()}
    exact = exact_gradients(model, lambda reference: loss(reference, ids))
    ours = gradient_errors(adapter_gradients(model), exact)
    peft = gradient_errors(peft_gradients, exact)
    assert statistics.mean(ours) <= 1.2 * statistics.mean(peft)
    assert statistics.median(ours) <= 0.1


def story(data_dir):
    """Two rows of real text: on random tokens attention saturates, and its gradients are noise."""
    directory = data_dir / "models" / "stories260K"
    text = (directory / "tinystories_sample.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    return torch.tensor(tokens[:96]).view(2, 48)


def loss(model, ids):
    out = model(input_ids=ids, use_cache=False).logits
    rows = out[:, :-1].reshape(-1, out.shape[-1])
    # In double, so that a difference of two losses is not rounded away.
    return torch.nn.functional.cross_entropy(rows.double(), ids[:, 1:].reshape(-1))


def test_directional_finite_differences_of_every_adapter_tensor(data_dir):
    directory = data_dir / "models" / "stories260K"
    model = inject_lora(load(directory), LoRAConfig(r=4)).train()
    randomize_adapter(model, scale=0.02)
    ids = story(data_dir)
    loss(model, ids).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Along the gradient, where the difference is largest against the rounding of the loss.
        direction = parameter.grad / parameter.grad.norm()
        eps, start, values = 1e-2, parameter.data.clone(), []
        for sign in (1, -1):
            parameter.data = start + sign * eps * direction
            with torch.no_grad():
                values.append(float(loss(model, ids)))
        parameter.data = start
        measured = (values[0] - values[1]) / (2 * eps)
        assert measured == pytest.approx(float(parameter.grad.norm()), rel=2e-3), name


# Several adapters


def test_switching_never_touches_the_base_and_gives_each_adapter_its_own_logits(directory):
    model = load(directory, dtype="bf16")
    base = logits(model)
    for number in range(3):
        inject_lora(model, LoRAConfig(r=2 + number), seed=number, adapter=f"a{number}")
        for layer in lora_layers(model).values():
            for weight in layer.weights(f"a{number}"):
                weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    weights, first = base_hash(model), {}
    for name in (*adapter_names(model), None):
        activate(model, name)
        first[name] = logits(model)
    assert torch.equal(first[None], base)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        name = list(first)[int(torch.randint(4, (), generator=generator))]
        activate(model, name)
        assert torch.equal(logits(model), first[name])
    assert base_hash(model) == weights


def test_unknown_and_active_adapters_are_refused_and_nothing_changes(directory):
    model = inject_lora(load(directory), adapter="a")
    randomize_adapter(model)
    before = logits(model)
    with pytest.raises(AdapterError, match="no adapter 'b'; it has a"):
        activate(model, "b")
    with pytest.raises(AdapterError, match="'a' is active"):
        remove_adapter(model, "a")
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        remove_adapter(model, "b")
    assert torch.equal(logits(model), before)
    activate(model, None)
    remove_adapter(model, "a")
    assert adapter_names(model) == []
    with pytest.raises(AdapterError, match="none: inject or load one first"):
        activate(model, "a")


def test_every_layer_has_its_own_dropout_key(directory):
    model = inject_lora(load(directory), LoRAConfig(dropout=0.5)).train()
    x, masks = torch.ones(32, 64), []
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.seek(1, 0)
            masks.append(module(x))
    assert len(masks) == 4
    for index, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:index])


def test_a_layer_without_the_active_adapter_is_the_base(directory):
    model = load(directory)
    inject_lora(model, LoRAConfig(target_modules="q_proj"), adapter="q")
    inject_lora(model, LoRAConfig(target_modules="v_proj"), adapter="v")
    randomize_adapter(model)
    activate(model, "q")
    mixed = logits(model)
    alone = inject_lora(load(directory), LoRAConfig(target_modules="q_proj"), adapter="q")
    for name, layer in lora_layers(alone).items():
        for mine, theirs in zip(
            layer.weights("q"), lora_layers(model)[name].weights("q"), strict=True
        ):
            mine.data.copy_(theirs.data)
    assert relative_error(logits(alone), mixed) == 0
