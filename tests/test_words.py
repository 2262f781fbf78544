"""The oracle of words and codes: numbers that the formats' contract states, inverses, and that it finds wrong bits."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from helpers import assert_each, assert_same_bits
from oracle import SPECS, codes, decode, ended, fractions, from_codes, nearest, spread
from torch import Tensor
from words import BF16, E4M3, FORMS, FP16, FP32, TWO, Codes, Remainder, form_of, scale_of

INT8, UINT8 = FORMS["int8/128"], FORMS["uint8/128"]
REMAINDERS = {name: form for name, form in FORMS.items() if isinstance(form, Remainder)}


def test_values_that_the_contract_states():
    assert (INT8.value(127), UINT8.value(254)) == (Fraction(31, 16), Fraction(15, 8))
    assert (INT8.value(4), UINT8.value(8)) == (TWO**-19, TWO**-39)
    assert (INT8.value(1), UINT8.value(1)) == (TWO**-21, TWO**-42)
    assert (INT8.value(0), UINT8.value(0)) == (0, 0)


@pytest.mark.parametrize(
    ("form", "steps"),
    [(INT8, {0: 16, 4: 8, 8: 4, 12: 2, 16: 1}), (UINT8, {0: 16, 4: 16, 8: 8, 12: 8, 16: 4, 20: 4, 24: 2, 32: 1})],
    ids=["int8", "uint8"],
)
def test_the_largest_relative_step_of_an_octave(form, steps):
    """As the contract's table has it, octaves below the top of a block."""
    values = [form.value(k) for k in range(form.top + 1)]
    for below, share in steps.items():
        low = TWO**-below
        found = [(b - a) / a for a, b in pairwise(values) if low <= a < 2 * low]
        assert max(found) == Fraction(1, share), below


@pytest.mark.parametrize("form", [INT8, UINT8], ids=["int8", "uint8"])
def test_a_code_is_the_inverse_of_its_value_and_linear_between_two(form):
    values = [form.value(k) for k in range(form.top + 1)]
    assert values == sorted(values)
    assert [form.code(value) for value in values] == list(range(form.top + 1))
    for k, (a, b) in enumerate(pairwise(values)):
        for part in (Fraction(1, 2), Fraction(3, 16)):
            assert form.code(a + part * (b - a)) == k + part


@pytest.mark.parametrize("name", REMAINDERS)
def test_what_a_word_is_split_in_joins_to_it(name):
    """All words of 16 bits, and some of more; a remainder fits in its plane."""
    form = FORMS[name]
    spec = form.word
    for word in range(0, spec.max_code + 1, {16: 3, 24: 2003, 32: 250_007}[spec.width]):
        for signed in (word, word | spec.sign):
            shown, rest = form.split(signed)
            assert -(1 << (form.bits - 1)) <= rest < 1 << (form.bits - 1)
            number = decode(form.value_of(shown, rest, 0), SPECS[FP32])
            assert number * TWO ** SPECS[FP32].unit == decode(signed, spec) * TWO**spec.unit


@pytest.mark.parametrize(
    ("name", "x", "shown", "rest"),
    [
        ("bf16+int16", 1 + 2.0**-8, 0x3F81, -(1 << 15)),  # a tie shows half up, where RN goes to even
        ("bf16+int16", -(1 + 2.0**-23), 0xBF80, 1),
        ("bf16+int16", 2 - 2.0**-23, 0x4000, -1),  # carried into the next binade
        ("bf16+int16", 3.4028234663852886e38, 0x7F80, -1),  # shows Inf, decodes finite
        ("bf16+int8", 1 + 2.0**-15, 0x3F80, 1),
        ("bf16+int8", 1 + 3 * 2.0**-16, 0x3F80, 2),  # a tie between 1 and 2, to even
        ("bf16+int8", 3.4028234663852886e38, 0x7F80, 0),  # rounds to Inf
        ("fp16+int8", 1 - 2.0**-20, 0x3C00, 0),  # half an ulp of 2**-19 below: to even
        ("fp16+int8", 1 - 3 * 2.0**-20, 0x3C00, -2),  # 1.5 ulps: to even
        ("fp16+int8", 65519.9, 0x7BFF, 127),
        ("fp16+int8", 65520.0, 0x7C00, 0),
        ("fp16+int8", -(2.0**-32), 0x8000, 1),
    ],
)
def test_remainders_that_are_known(name, x, shown, rest):
    form = FORMS[name]
    assert form.planes_of(codes(torch.tensor([x])).item(), 0, None) == (shown, rest)


def test_scales_that_are_known():
    for largest, top, scale in ((448, 448, 127), (449, 448, 128), (224, 448, 126), (1, 1, 127), (3, 1, 129)):
        assert scale_of([Fraction(largest), Fraction(-1, 1000), None], Fraction(top), 26, 246) == scale
    assert scale_of([None, Fraction(0)], Fraction(448), 26, 246) == 26
    assert scale_of([TWO**-149], Fraction(448), 26, 246) == 26
    assert scale_of([TWO**127], Fraction(448), 26, 246) == 246


def given(name: str) -> tuple[Tensor, Tensor]:
    """Numbers and random bits."""
    g = torch.Generator().manual_seed(5)
    x = spread(6, 140, 1)
    return x.abs() if name.startswith("uint8") else x, torch.randint(
        0, 1 << 16, (6, 140), generator=g, dtype=torch.int32
    )


@pytest.mark.parametrize("name", FORMS)
def test_every_wrong_bit_is_found(name):
    """In every plane, at the first, a middle and the last place; and in the decoded numbers."""
    x, _ = given(name)
    form = form_of(name)
    right = form.encode(x, None)
    assert_each(name, form.encode(x, None), right)
    for k, plane in enumerate(right):
        for place in (0, plane.numel() // 2, plane.numel() - 1):
            wrong = [p.clone() for p in right]
            wrong[k].view(-1).view(torch.uint8)[place * plane.element_size()] ^= 1
            with pytest.raises(AssertionError, match=f"plane {k}: 1 of"):
                assert_each(name, wrong, right)
    decoded = form.decode(right)
    wrong = from_codes(codes(decoded) ^ (torch.arange(840).view(6, 140) == 70), FP32)
    with pytest.raises(AssertionError, match="1 of 840"):
        assert_same_bits("decoded", wrong, decoded)


@pytest.mark.parametrize("name", FORMS)
def test_wrong_inputs_give_other_planes(name):
    """An input an ulp off, other random bits, the other rounding: the oracle is deaf to none of them."""
    x, random = given(name)
    form, inexact = form_of(name), name != "bf16+int16"
    nearest_, drawn = form.encode(x, None), form.encode(x, random)
    for wrong, applies in (
        (form.encode(ended(from_codes(codes(x) + 1, FP32), 3), None), True),
        (form.encode(x, random), inexact),
        (form.encode(x.roll(1, 1), None), True),
        (form.encode(2 * x, None), True),
    ):
        differs = any(bool((codes(a) != codes(b)).any()) for a, b in zip(wrong, nearest_, strict=True))
        assert differs == applies
    again = form.encode(x, random ^ 0xFFFF)
    assert any(bool((codes(a) != codes(b)).any()) for a, b in zip(again, drawn, strict=True)) == inexact


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3], ids=str)
def test_what_shows_is_rounded_to_nearest_but_for_ties(dtype):
    """The word of every second number between two: what is not a tie shows as `nearest` has it, and a tie goes up."""
    form = next(form for form in REMAINDERS.values() if form.shown == dtype)
    spec, g = form.word, torch.Generator().manual_seed(0)
    ties = 0
    for word in torch.randint(0, SPECS[dtype].max_code << form.bits, (2000,), generator=g).tolist():
        for w in (word, (word >> form.bits << form.bits) + (1 << (form.bits - 1))):
            shown, rest = form.split(w)
            tie = rest == -(1 << (form.bits - 1))
            assert tie or shown == nearest(decode(w, spec) * TWO**spec.unit, dtype)
            ties += tie
    assert ties >= 2000


def test_the_numbers_reach_every_scale():
    """Rows of `spread` have scales from the least to the largest, ties, and numbers far below their row's maximum."""
    x = spread(60, 20, 0)
    for form, least, most in ((INT8, 22, 254), (UINT8, 43, 254)):
        scales = form.encode(x.abs(), None)[1]
        assert (scales.min(), scales.max()) == (least, most)
    scales = FORMS["e4m3+int8"].encode(x, None)[2]
    assert (scales.min(), scales.max()) == (26, 246)
    below = [max(row) / min(filter(None, row)) for row in (list(map(abs, fractions(r))) for r in x)]
    assert max(below) > TWO**40
    assert isinstance(INT8, Codes)
