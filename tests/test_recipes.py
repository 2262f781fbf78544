"""Every row of the recipe table builds the architecture it names, and the tiny ones can be trained."""

import math

import pytest
import torch
from helpers import assert_same_bits

from collage.harness.tasks.recipes import RECIPES, build, get_recipe

pytest.importorskip("transformers")

IMAGES = [name for name, recipe in RECIPES.items() if recipe.of_images]
TINY = [name for name in RECIPES if name.startswith("tiny-") and name not in IMAGES]

# What the name or its publication says: Devlin et al. 2019, Liu et al. 2019, Brown et al. 2020, Zhang et al. 2022,
# Touvron et al. 2023. The tiny ones promise about a million.
PUBLISHED = {
    "bert-base": 110e6,
    "bert-large": 340e6,
    "roberta-base": 125e6,
    "gpt-125m": 125e6,
    "gpt-1.3b": 1.3e9,
    "gpt-2.7b": 2.7e9,
    "gpt-6.7b": 6.7e9,
    "gpt-30b": 30e9,
    "openllama-7b": 6.7e9,
    "minilm": 22.7e6,
    "smollm2-135m": 134.5e6,
}


def formula(r):
    """The number of parameters, counted from the papers' descriptions; a tied output matrix counts once."""
    h, i = r.hidden, r.intermediate
    attention, mlp, norm = 4 * (h * h + h), 2 * h * i + i + h, 2 * h  # with biases; LayerNorm has two vectors
    if r.family == "llama":  # no biases, three mlp matrices, RMSNorm has one vector, rotary positions
        tied, shared = (
            r.others.get("tie_word_embeddings", False),
            r.heads // r.others.get("num_key_value_heads", r.heads),
        )
        attention = 2 * h * h + 2 * h * h // shared
        return (1 if tied else 2) * r.vocab * h + r.layers * (attention + 3 * h * i + 2 * h) + h
    layers = r.layers * (attention + mlp + 2 * norm)
    if r.family == "gpt":  # one norm more at the end
        return (r.vocab + r.positions) * h + layers + norm
    segments = 1 if r.family == "roberta" else 2
    unused_positions = r.pad_id + 1 if r.family == "roberta" and r.pad_id is not None else 0
    embeddings = (r.vocab + r.positions + unused_positions + segments) * h + norm
    if r.family == "bert-classifier":
        return embeddings + layers + h * h + h + 2 * h + 2  # a pooler, and two classes
    head = h * h + h + norm + r.vocab  # dense, norm, and one bias per word
    return embeddings + layers + head


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not (recipe.of_images or recipe.plays)])
def test_parameter_count(name):
    recipe = RECIPES[name]
    model = build(name, device="meta")
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert count(model) == formula(recipe)
    assert count(model) == pytest.approx(PUBLISHED.get(name, 1e6), rel=0.05 if name in TINY else 0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_row_is_consistent(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.hidden % recipe.heads == 0
    for phase in recipe.phases:
        assert phase.seq_len <= recipe.positions
        assert phase.batch % phase.micro_batch == 0
        assert 0 < phase.warmup_steps < phase.steps


def test_hyper_parameters_of_the_paper():
    """The numbers a user would look up, written out once more."""
    assert [(p.seq_len, p.lr) for p in RECIPES["bert-base"].phases] == [(128, 4e-4), (512, 2.8e-4)]
    assert [(p.seq_len, p.lr) for p in RECIPES["bert-large"].phases] == [(128, 4e-4), (512, 2.8e-4)]
    for name in ("bert-base", "bert-large", "roberta-base"):
        r = RECIPES[name]
        assert (r.eps, r.weight_decay, r.max_grad_norm, r.schedule) == (1e-6, 0.01, 1.0, "linear")
    assert RECIPES["bert-base"].betas == (0.9, 0.999)
    assert (RECIPES["roberta-base"].betas, RECIPES["roberta-base"].phases[0].lr) == ((0.9, 0.98), 6e-4)
    for size, lr in {"125m": 6e-4, "1.3b": 2e-4, "2.7b": 1.6e-4, "6.7b": 1.2e-4}.items():
        r = RECIPES[f"gpt-{size}"]
        assert (r.betas, r.weight_decay, r.eps, r.schedule) == ((0.9, 0.95), 0.1, 1e-8, "cosine-to-a-tenth")
        (phase,) = r.phases
        assert (phase.seq_len, phase.warmup_steps, phase.lr) == (2048, 200, lr)


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_trains(name):
    recipe = RECIPES[name]
    model = build(name)
    ids = torch.randint(4, 260, (4, recipe.positions), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    # Random weights know nothing. The logits they give are small, so the loss is that of a uniform guess: within 10 %.
    assert loss.item() == pytest.approx(math.log(recipe.vocab), rel=0.1)
    assert_all_reached(model)


@pytest.mark.parametrize("name", IMAGES)
def test_tiny_model_of_images_trains(name):
    recipe = RECIPES[name]
    model = build(name)
    pixels = torch.randn(20, 1, recipe.positions, recipe.positions, generator=torch.Generator().manual_seed(0))
    loss = model(pixel_values=pixels, labels=torch.arange(20) % recipe.vocab).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(recipe.vocab), rel=0.1)  # as above
    assert_all_reached(model)


def assert_all_reached(model):
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert bool(p.grad.isfinite().all()), parameter_name
        assert p.grad.any(), f"{parameter_name} is not reached by the loss"


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b, other = build("tiny-gpt", seed=1), build("tiny-gpt", seed=1), build("tiny-gpt", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 123
    pairs = [(x, y, z) for x, y, z in zip(a.parameters(), b.parameters(), other.parameters(), strict=True)]
    for x, y, _ in pairs:
        assert_same_bits("weight", x, y)
    assert not all(torch.equal(x, z) for x, _, z in pairs)


def test_ambient_device_and_default_dtype():
    with torch.device("meta"):
        assert all(p.is_meta for p in build("tiny-llama").parameters())
        assert not any(p.is_meta for p in build("tiny-llama", device="cpu").parameters())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {p.dtype for p in build("tiny-llama").parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_vocabulary_and_length():
    model = build("tiny-roberta", vocab_size=512, seq_len=16, pad_id=3)
    assert model.get_input_embeddings().weight.shape == (512, 192)
    assert model.roberta.embeddings.position_embeddings.weight.shape == (16 + 3 + 1, 192)
    ids = torch.randint(4, 512, (2, 16))
    assert model(input_ids=ids).logits.shape == (2, 16, 512)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt-5': no such recipe; known: tiny-gpt, .*openllama-7b"):
        get_recipe("gpt-5")
    with pytest.raises(ValueError, match="no such recipe"):
        build("gpt-5")
