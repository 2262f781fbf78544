"""The floors against walks: feed the increment again and again and see whether it gets stuck."""

import math

import pytest
import torch
from helpers import BARE, assert_same_bits
from torch import Tensor

import collage
from collage import floors
from collage.floors import THETA_FORMATS, DecayFloor, Floor, decay_floor, decay_floors, floor, floors_table
from collage.formats import FORMATS, Expansion, format_of, split

NEAREST = [
    pytest.param(name, arithmetic, id=f"{name}-{arithmetic}")
    for name, arithmetic in sorted(
        {(s.param, s.arithmetic) for s in BARE.values()}
        | {(name, "float32") for name in ("fp16", "fp16+fp32", "bf16+int8", "fp16+int8")}
    )
    if not FORMATS[name].stochastic
]
STEPS = 600  # more than it takes from one value of the first component to the next at any floor; in float16 8 times
BELOW, ABOVE = (0.05, 0.3, 0.7, 0.9, 0.99), (1.02, 1.1, 1.6, 3.0)
FACTORS = torch.tensor(BELOW + ABOVE, dtype=torch.float64)


def stuck_after(
    name: str, arithmetic: str, at: float, delta: Tensor, decay: bool = False, steps: int | None = None
) -> list[bool]:
    """For each increment (or decay per step): does a walk from ``at`` end before the first component moves?"""
    fmt, register = format_of(name), floors.register_of(name, arithmetic)
    delta = delta.to(torch.float32).to(register)
    start = planes = split(fmt, torch.full(delta.shape, at))
    alone = len(fmt.components(start)) == 1  # one number moves at the first step, or not
    for _ in range(steps or (20 if alone else 8 * STEPS if fmt.dtypes[0] == torch.float16 else STEPS)):
        before = planes
        number = fmt.load(planes, register)
        planes = fmt.encode(number.grown(-(delta * number.value) if decay else delta))
    stayed = fmt.components(planes)[0] == fmt.components(start)[0]
    for a, b in zip(before, planes, strict=True):
        assert_same_bits("not just slow", a[stayed], b[stayed])
    return stayed.tolist()


def test_the_floors_at_one_are_those_that_the_documentation_states():
    ulp = 2.0**-7  # of bf16 at 1.0; half of it going down
    expected = {
        "bf16": (ulp / 2, ulp / 4),
        "bf16x2": (2.0**-17, 2.0**-18),
        "fp16x2": (2.0**-23, 2.0**-24),
        "bf16+kahan": (2.0**-16, 2.0**-17),
        "bf16+fp32": (2.0**-24, 2.0**-25),
        "fp32": (2.0**-24, 2.0**-25),
        "bf16+int16": (2.0**-24, 2.0**-25),
        "bf16+int8:sr": (2.0**-24, 2.0**-25),
    }
    table = floors_table()
    assert table.keys() == set(THETA_FORMATS)
    for name, (up, down) in expected.items():
        assert table[name] == pytest.approx((up, down), rel=2e-4), name


@pytest.mark.parametrize(
    ("name", "ulp"),
    [("bf16+int8", 2.0**-15), ("fp16+int8", 2.0**-18), ("e4m3+int16", 2.0**-19), ("e4m3+int8", 2.0**-11)],
)
def test_the_floors_at_one_of_remainders(name, ulp):
    """Half an ulp of the word, half of that towards zero; the sum that is rounded to it is a float32 itself, and what
    is half an ulp of that above the middle is still rounded to the middle.
    """
    assert floor(name) == pytest.approx((ulp / 2 + 2.0**-24, ulp / 4 + 2.0**-25), rel=1e-6)


@pytest.mark.parametrize("name", ["e4m3+int16", "e4m3+int8", "e4m3+int8:sr", "e4m3+int16:sr"])
def test_the_floors_of_a_row_of_one_follow_its_scale(name):
    one = floor(name)
    for at in (2.0**-20, 2.0**20, -1.0):
        assert floor(name, at) == Floor(one.up * abs(at), one.down * abs(at))
    assert floor(name, 1.5).up == pytest.approx(one.up, rel=0.1)


@pytest.mark.parametrize(("name", "arithmetic"), NEAREST)
@pytest.mark.parametrize("at", [1.0, 1.5, -1.0, 3.0 * 2**-20])
def test_a_smaller_increment_gets_stuck_and_a_larger_one_never_does(name, arithmetic, at):
    expected = [True] * len(BELOW) + [False] * len(ABOVE)
    for toward, limit in zip((1, -1), floor(name, at, arithmetic), strict=True):
        delta = math.copysign(toward, toward * at) * limit * FACTORS
        assert stuck_after(name, arithmetic, at, delta) == expected, "up" if toward > 0 else "down"


@pytest.mark.parametrize(("name", "arithmetic"), NEAREST)
@pytest.mark.parametrize("k", [0, 1, 64, 127])
def test_a_decay_below_its_floor_stops_and_above_it_goes_on(name, arithmetic, k):
    limit = decay_floors(name, arithmetic)[k]
    expected = [True] * len(BELOW) + [False] * len(ABOVE)
    assert stuck_after(name, arithmetic, 1 + k / 128, limit * FACTORS, decay=True) == expected


def test_the_decay_floor_spans_a_binade():
    for name, half_ulp in {"bf16": 2.0**-8, "bf16x2": 2.0**-17, "fp32": 2.0**-24}.items():
        assert decay_floor(name) == pytest.approx(DecayFloor(half_ulp / 2, half_ulp), rel=0.01), name


@pytest.mark.parametrize("toward", [1, -1])
def test_three_components_go_on_until_the_third_drops_an_increment(toward):
    """From where little is missing until the first component moves: all the way would take 100,000 steps."""
    at = 1.5 + toward * (2.0**-8 - 2.0**-16)
    limit = floor("bf16x3", at)[toward < 0]
    assert limit == pytest.approx(2.0**-26, rel=0.01)
    assert limit == floor("bf16x3", 1.5)[toward < 0]  # that of every state on the way
    stuck = stuck_after("bf16x3", "float32", at, toward * limit * FACTORS, steps=1500)
    assert stuck == [True] * len(BELOW) + [False] * len(ABOVE)


LEFT = {"bf16x2:sr": 2.0**-32, "bf16x3:sr": 2.0**-32, "fp16x2:sr": 2.0**-35}
OF_WEIGHTS = [name for name, fmt in FORMATS.items() if fmt.stochastic and fmt.dtypes[0].is_floating_point]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_stochastic_format_keeps_only_the_floor_of_its_register(name):
    """Half an ulp of the float32 sum: of the number, 2**-24 at 1, or of the low components that an expansion grows
    first, which are below 2**-8 (bfloat16) and 2**-11 (float16).
    """
    limit, left = floor(name), LEFT.get(name, 2.0**-24)
    assert limit == pytest.approx((left, left / 2), rel=1e-4)
    fmt = format_of(name)
    assert limit.up < floor(name.removesuffix(":sr")).up / 15
    generator = torch.Generator().manual_seed(0)
    theta = split(fmt, torch.ones(100, 100))
    for delta, arrives in ((limit.up / 2, isinstance(fmt, Expansion)), (100 * limit.up, True)):
        random = torch.randint(0, 1 << 16, (100, 100), generator=generator, dtype=torch.int32)
        new = fmt.encode(fmt.load(theta, torch.float32).grown(torch.tensor(delta)), random)
        assert any(bool((a != b).any()) for a, b in zip(theta, new, strict=True)) == arrives


def test_floor_of_bf16_with_stochastic_rounding_is_that_of_fp32():
    assert floor("bf16:sr") == floor("fp32")


@pytest.mark.parametrize("name", THETA_FORMATS)
def test_floors_scale_with_the_binade_and_ignore_the_sign(name):
    one = floor(name)
    for scale in (2.0**-20, 2.0**20) if name != "fp16x2" else ():
        assert floor(name, scale) == Floor(one.up * scale, one.down * scale)
    assert floor(name, -1.0) == one
    assert one.down <= one.up <= 2 * one.down * (1 + 1e-6)


def test_the_floor_of_fp16x2_ends_where_its_low_component_is_subnormal():
    one = floor("fp16x2")
    assert floor("fp16x2", 4.0) == Floor(4 * one.up, 4 * one.down)
    for at in (2.0**-4, 0.01, 3 * 2.0**-14, 2.0**-16, 2.0**-22):
        assert floor("fp16x2", at) == pytest.approx((2.0**-25, 2.0**-25), rel=2e-3), at
    for exponent in range(-14, -3):  # the same decrement is twice as large a share of weights half as large
        floors_ = decay_floors("fp16x2", exponent=exponent)
        weights = (1 + torch.arange(128, dtype=torch.float64) / 128) * 2.0**exponent
        assert (floors_ * weights * 2**25 - 1).abs().max() < 0.01, exponent
    assert decay_floors("fp16x2", exponent=-26).eq(1).all()  # 0 in fp16


@pytest.mark.parametrize("exponent", [-3, -9, -18])
def test_a_decay_of_small_weights_in_fp16x2(exponent):
    limit = decay_floors("fp16x2", exponent=exponent)[64]
    expected = [True] * len(BELOW) + [False] * len(ABOVE)
    assert stuck_after("fp16x2", "float32", 1.5 * 2.0**exponent, limit * FACTORS, decay=True) == expected


@pytest.mark.parametrize("name", THETA_FORMATS)
@pytest.mark.parametrize("step", [1e-3, 1e-5, 3e-8])
def test_every_weight_below_the_quick_limit_moves(name, step):
    fmt, register = format_of(name), floors.register_of(name)
    generator = torch.Generator().manual_seed(1)
    limit = floors.movable_below(name, step)
    x = torch.rand(20_000, generator=generator) * min(limit, 1e4) * (1 - 2**-20)
    delta = torch.tensor(step, dtype=register)
    for sign in (1, -1):
        assert not floors.unchanged(fmt, register, split(fmt, x), sign * delta).any()


def test_a_step_below_the_floor_of_the_smallest_weights_has_no_quick_limit():
    assert floors.movable_below("fp16x2", 2.0**-25) == 0.0
    assert floors.movable_below("fp16x2", 2.0**-25 * 1.01) > 2.0**-4


def test_errors_name_what_is_known():
    with pytest.raises(ValueError, match=r"unknown format 'bf17'; known formats: .*bf16x2"):
        floor("bf17")
    with pytest.raises(ValueError, match="arithmetic: unknown 'fp64'; known: float32, bfloat16"):
        floor("bf16", arithmetic="fp64")
    for at in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite weight other than zero"):
            floor("bf16", at)


# The numbers of README.md


@pytest.mark.parametrize(
    ("strategy", "arrived"), [("collage-plus", 0.16), ("collage-plus-sr", 1.0), ("fp32-master", 1.015)]
)
def test_decay_below_the_floor_of_collage_plus(strategy, arrived):
    model = torch.nn.ParameterDict({"w": torch.ones(4096).bfloat16()})
    opt = collage.AdamW(model.named_parameters(), lr=1e-5, weight_decay=0.1, strategy=strategy)
    model["w"].grad = torch.zeros(4096).bfloat16()
    for _ in range(3000):
        opt.step()
    end = collage.high_precision_state_dict(model, opt)["w"].double().mean().item()
    assert (1 - end) / (1 - (1 - 1e-6) ** 3000) == pytest.approx(arrived, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "covered"), [("bf16x2", 0.03), ("bf16x2:sr", 0.86), ("fp32", 0.86)])
def test_an_average_below_the_floor(form, covered):
    model = torch.nn.ParameterDict({"w": torch.ones(256).bfloat16()})
    ema = collage.EMA(model, decay=0.9999, format=form)
    model["w"].data.fill_(1.0625)
    for _ in range(20_000):
        ema.update()
    assert float(ema.value("w").mean() - 1) / 0.0625 == pytest.approx(covered, abs=0.005)
