"""The table of strategies: names, letters, specs, bytes, and what it refuses."""

import pytest
import torch

import collage
from collage.strategies import ALIASES, STRATEGIES, Strategy

# DESIGN: bytes per parameter with a gradient in the parameter's dtype.
BYTES = {
    "bf16": 8, "collage-light": 10, "collage-plus": 12, "collage-plus-sr": 12, "paper-bf16": 8, "paper-light": 10,
    "paper-plus": 12, "fp32-states": 12, "fp32-master": 16, "fp32": 16, "kahan": 10, "stochastic": 8,
    "collage-fp16": 10,
}  # fmt: skip


def test_every_strategy_has_its_bytes():
    assert {name: s.bytes_per_param() for name, s in STRATEGIES.items()} == BYTES


@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_of_the_live_tensors(name):
    """Parameter, gradient and every plane of the state, counted after a step."""
    strategy = STRATEGIES[name]
    p = torch.nn.Parameter(torch.ones(1000, dtype=strategy.dtype))
    opt = collage.AdamW([p], strategy=name)
    p.grad = torch.ones_like(p)
    opt.step()
    tensors = [p, p.grad, *(plane for key, plane in opt.state[p].items() if key != "step")]
    assert sum(t.nbytes for t in tensors) == BYTES[name] * p.numel()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_survives_its_text(name):
    strategy = STRATEGIES[name]
    assert str(strategy) == name
    assert Strategy.parse(name) is strategy
    custom = Strategy(strategy.param, "fp32", "fp32") if strategy.arithmetic == "float32" else strategy
    assert Strategy.parse(str(custom)) == custom
    assert Strategy.parse(" " + str(custom).replace(",", ", ").replace("=", " = ")) == custom


def test_letters_of_the_paper():
    assert {letter: str(Strategy.parse(letter)) for letter in ALIASES} == ALIASES


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"param": "bf17"}, "param: unknown format 'bf17'; known formats: fp32, bf16"),
        ({"momentum": "bf16+fp32"}, "momentum: 'bf16\\+fp32' is a format for param"),
        ({"variance": "bf16+kahan"}, "variance: 'bf16\\+kahan' is a format for param"),
        ({"arithmetic": "float16"}, "arithmetic: unknown 'float16'; known: float32, bfloat16"),
        (
            {"momentum": "fp32", "arithmetic": "bfloat16"},
            "momentum: bfloat16 arithmetic takes 'bf16', 'bf16x2', 'bf16[+]kahan'",
        ),
        ({"param": "bf16:sr", "arithmetic": "bfloat16"}, "param: bfloat16 arithmetic"),
        ({"param": "bf16+kahan"}, "use arithmetic='bfloat16'"),
    ],
)
def test_a_meaningless_strategy_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Strategy(**kwargs)


@pytest.mark.parametrize("text", ["colage-plus", "param=bf16,speed=fast", "", "E"])
def test_an_unknown_name_lists_the_known_ones(text):
    with pytest.raises(ValueError, match="known: bf16, collage-light, collage-plus"):
        Strategy.parse(text)


def test_a_misspelt_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown 'colage_plus'.*; did you mean 'collage-plus'\?$"):
        Strategy.parse("colage_plus")
    with pytest.raises(ValueError, match=r"arithmetic=float32'$"):
        Strategy.parse("E")
