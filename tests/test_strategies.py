"""The table of strategies: names, letters, specs, bytes, and what it refuses."""

import re

import pytest
import torch
from helpers import BARE

import collage
from collage.formats import FORMATS, Companded, Cut, Word
from collage.strategies import ALIASES, STRATEGIES, Strategy

# DESIGN: bytes per parameter with a gradient in the parameter's dtype.
BYTES = {
    "bf16": 8, "collage-light": 10, "collage-plus": 12, "collage-plus-sr": 12, "paper-bf16": 8, "paper-light": 10,
    "paper-plus": 12, "fp32-states": 12, "fp32-master": 16, "fp32": 16, "kahan": 10, "stochastic": 8,
    "fp8-master": 15 + 1 / 1024,
    "collage-fp16": 10, "collage-exact": 12, "collage-exact-lean": 10, "collage-8bit-plus": 8 + 2 / 128,
    "collage-8bit": 7 + 2 / 128, "collage-fp8": 7 + 2 / 128 + 1 / 1024, "collage-fp8-lean": 6 + 2 / 128 + 1 / 1024,
}  # fmt: skip
REMAINDERS = [name for name, fmt in FORMATS.items() if isinstance(fmt, Cut | Word) and fmt.elementwise]
E4M3 = [name for name, fmt in FORMATS.items() if fmt.dtypes[0] == torch.float8_e4m3fn]
CODES = [name for name, fmt in FORMATS.items() if isinstance(fmt, Companded)]


def test_every_strategy_has_its_bytes():
    assert {name: s.bytes_per_param() for name, s in STRATEGIES.items()} == BYTES


@pytest.mark.parametrize("name", BARE)
def test_bytes_of_the_live_tensors(name):
    """Parameter, gradient and every plane of the state, counted after a step; of a vector, those of the twins."""
    strategy = STRATEGIES[name]
    for shape in ((64, 128), (1000,)):
        p = torch.nn.Parameter(torch.ones(shape, dtype=strategy.dtype))
        opt = collage.AdamW([p], strategy=name, backend="reference")
        p.grad = torch.ones_like(p)
        opt.step()
        tensors = [p, p.grad, *(plane for key, plane in opt.state[p].items() if key != "step")]
        wanted = BYTES[name] if len(shape) == 2 else strategy.small.bytes_per_param()
        assert sum(t.nbytes for t in tensors) == wanted * p.numel()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_survives_its_text(name):
    strategy = STRATEGIES[name]
    assert str(strategy) == name
    assert Strategy.parse(name) is strategy
    custom = Strategy(strategy.param, "fp32", "fp32") if strategy.arithmetic == "float32" else strategy
    assert Strategy.parse(str(custom)) == custom
    assert Strategy.parse(" " + str(custom).replace(",", ", ").replace("=", " = ")) == custom


SMALL = [(), (4096,), (100_000,), (63, 64), (2, 32, 63), (4096, 1), (200, 31), (1000, 5, 6), (0, 64), (64, 0)]
LARGE = [(64, 64), (128, 32), (1, 4096), (2, 32, 64), (100, 4, 3, 4), (50_000, 768)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_small_parameters_take_twins(name):
    """Fewer than two dimensions, than 4,096 elements, or than 32 in a row: no blocks there. Others are the same."""
    strategy = STRATEGIES[name]
    assert {strategy.of(shape) for shape in SMALL} == {strategy.small}
    assert {strategy.of(shape) for shape in LARGE} == {strategy}
    assert strategy.small.small == strategy.small
    assert (strategy.small == strategy) == (not name.startswith(("collage-8bit", "collage-fp8")))
    assert all(FORMATS[fmt].elementwise for fmt in strategy.small.beside.formats())


@pytest.mark.parametrize(
    ("formats", "small"),
    [
        (("bf16+int8:sr", "int8/128:sr", "uint8/128:sr"), ("bf16+int8:sr", "bf16:sr", "bf16x2:sr")),
        (("bf16x2:sr", "int8/128:sr", "uint8/128:sr"), ("bf16x2:sr", "bf16:sr", "bf16x2:sr")),
        (("bf16x2", "int8/128", "uint8/128"), ("bf16x2", "bf16", "bf16x2")),
        (("bf16", "fp32", "uint8/128:sr"), ("bf16", "fp32", "bf16x2:sr")),
        (("bf16+int16", "bf16", "bf16x2"), ("bf16+int16", "bf16", "bf16x2")),
    ],
    ids=lambda formats: " ".join(formats),
)
def test_the_twins_of_formats_with_blocks(formats, small):
    assert Strategy(*formats).small.formats() == small


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
        ({"momentum": "uint8/128:sr"}, "momentum: 'uint8/128:sr' has no sign; use 'int8/128:sr'"),
        ({"momentum": "uint8/128"}, "momentum: 'uint8/128' has no sign"),
        ({"variance": "int8/128:sr"}, "variance: 'int8/128:sr' lets a second moment become 0, .*; use 'uint8/128:sr'"),
        ({"variance": "int8/128"}, "variance: 'int8/128' lets"),
        *(({"param": name}, f"param: {name!r} has no weight") for name in CODES),
        *(
            ({role: name}, f"{role}: {re.escape(repr(name))} is a format for param")
            for role in ("momentum", "variance")
            for name in (*REMAINDERS, *E4M3)
        ),
        *(
            ({"param": name, "arithmetic": "bfloat16"}, f"param: bfloat16 arithmetic takes .*{re.escape(name)}")
            for name in REMAINDERS
        ),
        ({"momentum": "int8/128", "arithmetic": "bfloat16"}, "momentum: bfloat16 arithmetic takes"),
        ({"variance": "uint8/128", "arithmetic": "bfloat16"}, "variance: bfloat16 arithmetic takes"),
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
