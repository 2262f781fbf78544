"""The folded constants: powers, one rounding, and AdamW's seven numbers against their formulas in exact arithmetic."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from oracle import SPECS, codes, fractions, from_codes, nearest

from collage.rules.adamw import fold
from collage.rules.folding import power, rounded, tensors

BF16, FP32 = torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
BASES = (0.0, 0.5, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 1.0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("t", [0, 1, 2, 3, 7, 8, 100, 255, 256, 1000, 1023, 4096, 5001])
def test_power_is_within_its_rounding_errors(base, t):
    """base**(2**k) carries 2**k - 1 roundings, and each set bit of t adds one: t + 64 halves of an ulp are ample."""
    exact = Fraction(base) ** t
    tiny = Fraction(2) ** -1074 * 64  # where float64 itself underflows
    assert abs(Fraction(power(base, t)) - exact) <= (t + 64) * Fraction(2) ** -53 * exact + tiny


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("t", [1, 2, 3, 6, 77, 1000, 54321])
def test_power_multiplies_squares_from_the_least_significant_bit(base, t):
    """Any order is as exact; this one is the contract that other backends must meet."""
    squares = [base]
    while len(squares) < t.bit_length():
        squares.append(squares[-1] * squares[-1])
    product = 1.0
    for k, square in enumerate(squares):
        if t >> k & 1:
            product = product * square
    assert power(base, t) == product


def test_order_of_multiplication_matters():
    """So the test above can fail: from the most significant bit the last bits differ."""

    def other(base: float, t: int) -> float:
        result = 1.0
        for bit in bin(t)[2:]:
            result = result * result * (base if bit == "1" else 1.0)
        return result

    assert any(power(0.999, t) != other(0.999, t) for t in range(1, 200))


def cases(dtype: torch.dtype) -> list[float]:
    """float64 at, next to and between the numbers of dtype: normal, subnormal, tiny and at the overflow threshold."""
    g = torch.Generator().manual_seed(0)
    spec = SPECS[dtype]
    some = torch.randint(0, spec.max_code, (1500,), generator=g)
    some = torch.cat([some, torch.arange(200), spec.max_code - torch.arange(200)])
    number = from_codes(some, dtype).double()
    step = from_codes((some + 1).clamp(max=spec.max_code), dtype).double() - number
    step = torch.where(step == 0, 2.0 ** (127 - spec.precision + 1), step)
    middle = number + step / 2
    at = torch.cat([number, middle, number + step / 4])
    up, down = (torch.nextafter(at, torch.tensor(w, dtype=torch.float64)) for w in (math.inf, -math.inf))
    return torch.cat([at, up, down, -at, -up]).tolist()


@BOTH
def test_rounded_is_the_nearest_even(dtype):
    x = cases(dtype)
    want = from_codes([nearest(Fraction(value), dtype) for value in x], dtype).double().tolist()
    wrong = [(value, rounded(value, dtype), w) for value, w in zip(x, want, strict=True) if rounded(value, dtype) != w]
    assert not wrong, wrong[:5]


@BOTH
def test_rounded_is_exact_on_numbers_of_the_format_and_leaves_special_values(dtype):
    spec = SPECS[dtype]
    for x in from_codes(torch.arange(0, spec.max_code, spec.max_code // 1000), dtype).double().tolist():
        assert rounded(x, dtype) == x
    assert [math.copysign(1, rounded(z, dtype)) for z in (0.0, -0.0)] == [1, -1]
    assert [rounded(x, dtype) for x in (math.inf, -math.inf)] == [math.inf, -math.inf]
    assert math.isnan(rounded(math.nan, dtype))


def test_rounded_rounds_once():
    """Just above a tie of bfloat16, by less than float32 can hold: through float32 it would be taken for the tie."""
    for tie, up in ((1 + 2**-8, 1 + 2**-7), (2.0**-134, 2.0**-133), (3 * 2.0**-134, 2 * 2.0**-133)):
        x = math.nextafter(tie, math.inf)
        assert rounded(x, BF16) == up
        assert torch.tensor(x, dtype=torch.float64).float().double().item() == tie
    assert rounded(1 + 2**-8, BF16) == 1.0
    assert rounded(2.0**-134, BF16) == 0.0
    limit = float(torch.finfo(BF16).max) + 2.0**119
    assert rounded(limit, BF16) == math.inf
    assert rounded(math.nextafter(limit, 0), BF16) == torch.finfo(BF16).max


@BOTH
@pytest.mark.parametrize("step", [1, 2, 10, 1000, 20_000])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "decay"),
    [
        (1e-3, (0.9, 0.999), 1e-8, 0.01), (6e-4, (0.9, 0.95), 1e-8, 0.1), (4e-4, (0.9, 0.98), 1e-6, 0.01),
        (0.0, (0.0, 0.0), 0.0, 0.0), (1e-30, (0.5, 0.9999), 1e-12, 0.3),
    ],
)  # fmt: skip
def test_fold_is_the_formula_rounded(dtype, step, lr, betas, eps, decay):
    """Against 60 digits. Half an ulp, and what float64 may lose before the rounding."""
    got = tensors(fold(lr, (*betas, eps, decay), step, dtype), dtype, torch.device("cpu"))
    with localcontext() as context:
        context.prec = 60
        b1, b2, rate, epsilon, wd = (Decimal(x) for x in (*betas, lr, eps, decay))
        s = (1 - b2**step).sqrt()
        want = {
            "one_minus_beta1": 1 - b1, "one_minus_beta2": 1 - b2, "a": rate * s / (1 - b1**step), "e": epsilon * s,
            "w": rate * wd,
        }  # fmt: skip
    for name, value in want.items():
        tensor = getattr(got, name)
        assert tensor.dtype == dtype
        assert tensor.shape == ()
        (number,) = fractions(tensor)
        slack = Fraction(2) ** -SPECS[dtype].precision + Fraction(1, 10**11)
        smallest = Fraction(2) ** (SPECS[dtype].unit - 1)
        assert abs(number - Fraction(value)) <= slack * Fraction(value) + smallest, name


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999])
def test_betas_are_expansions_in_bfloat16_and_single_in_float32(beta):
    """In bfloat16 0.999 alone would be 1.0; with a second component beta is off by 2**-17 of itself at most."""
    hi, lo = tensors(fold(1e-3, (beta, beta, 1e-8, 0.0), 1, BF16), BF16, torch.device("cpu")).beta2
    assert codes(hi).item() == nearest(Fraction(beta), BF16)
    assert codes(lo).item() == nearest(Fraction(beta) - fractions(hi)[0], BF16)
    assert abs(fractions(hi)[0] + fractions(lo)[0] - Fraction(beta)) <= Fraction(beta) / 2**17
    (single,) = tensors(fold(1e-3, (beta, beta, 1e-8, 0.0), 1, FP32), FP32, torch.device("cpu")).beta1
    assert codes(single).item() == nearest(Fraction(beta), FP32)
