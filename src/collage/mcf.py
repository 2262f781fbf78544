"""Multi-component floats: rounding (rounding.py), error-free transforms, expansion arithmetic.

A *component* is a tensor of a narrow float format F. An *expansion* is a tuple of components, largest first, whose
unevaluated sum is the number. Write RN for round-to-nearest-even into F, u = 2**-p for F's precision p, Omega for its
largest finite value. Every ``+ - *`` below is one operation of F: it rounds once, to F.

    format          p   emin   Omega       smallest subnormal
    float8_e5m2     3    -14   57344       2**-16
    float8_e4m3fn   4     -6   448         2**-9
    float16        11    -14   65504       2**-24
    bfloat16        8   -126   3.39e38     2**-133
    float32        24   -126   3.40e38     2**-149

Sources: Dekker 1971; Knuth, TAOCP 2, 4.2.2; Shewchuk 1997; Joldes, Muller, Popescu 2017 (double-word arithmetic);
Boldo, Graillat, Muller 2017 (overflow); Yu et al. 2024 (Collage). Error bounds of more than two
components come from no theorem: a million random operands of every format stay below them (``tests/test_mcf.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from collage.rounding import FLOATS as FLOATS
from collage.rounding import rn as rn
from collage.rounding import sr as sr

Expansion = tuple[Tensor, ...]
_F = TypeVar("_F", bound=Callable[..., Any])


def sign(x: Tensor) -> Tensor:
    """1, -1, or x itself where it is +-0 or NaN."""
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)


def sqrt(x: Tensor) -> Tensor:
    """Square root, rounded once to x's format: float32, bfloat16 or float16.

    On CPU torch's own float32 root is MKL's, which is an ulp off for one argument in five. The root of a float32 stays
    clear of every midpoint of two float32 by 2**-51 of itself, so float64 and one more rounding give the right one.
    """
    return x.double().sqrt().float() if x.dtype == torch.float32 else x.sqrt()


class _Emulated:
    """A narrow tensor whose + - * are computed in float32 and rounded once by `rn`.

    Correctly rounded, because 24 >= 2p + 2 (Figueroa 1995). For 8-bit formats, which have no arithmetic in torch, and
    under a compiler, which would keep the float32 and skip the rounding.
    """

    __slots__ = ("dtype", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype = x.float(), x.dtype

    def _rounded(self, x: Tensor) -> _Emulated:
        return _Emulated(rn(x, self.dtype))

    def __add__(self, other: _Emulated) -> _Emulated:
        return self._rounded(self.x + other.x)

    def __sub__(self, other: _Emulated) -> _Emulated:
        return self._rounded(self.x - other.x)

    def __mul__(self, other: _Emulated) -> _Emulated:
        return self._rounded(self.x * other.x)

    def tensor(self) -> Tensor:
        return rn(self.x, self.dtype)


def _rounding_to_its_format(function: _F) -> _F:
    """Make ``+ - *`` on ``function``'s two tensors round to their format, and refuse two formats."""

    @wraps(function)
    def rounded(a: Tensor, b: Tensor) -> Any:
        if a.dtype != b.dtype or a.dtype not in _KNOWN:
            known = ", ".join(str(d).removeprefix("torch.") for d in _KNOWN)
            raise TypeError(f"{function.__name__}: got {a.dtype} and {b.dtype}; both must have one dtype of {known}")
        if a.dtype == torch.float32 or (a.dtype in _NATIVE and not torch.compiler.is_compiling()):
            return function(a, b)
        result = function(_Emulated(a), _Emulated(b))
        return tuple(r.tensor() for r in result) if isinstance(result, tuple) else result.tensor()

    return rounded  # type: ignore[return-value]


_KNOWN = (torch.float32, *FLOATS)
_NATIVE = (torch.bfloat16, torch.float16)  # torch computes each operation in float32 and rounds once


@_rounding_to_its_format
def _sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@_rounding_to_its_format
def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@_rounding_to_its_format
def fast_two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``s + e == a + b`` exactly, s = RN(a + b). Requires |a| >= |b| or a == 0 (unchecked), s finite. 3 operations.

    Dekker 1971; what Collage builds on. Exact too wherever a is a multiple of ulp(b). A saturated s
    (float8_e4m3fn) does no harm: the error is the rest.

    >>> fast_two_sum(torch.tensor(256.0).bfloat16(), torch.tensor(1.0).bfloat16())
    (tensor(256., dtype=torch.bfloat16), tensor(1., dtype=torch.bfloat16))
    """
    s = a + b
    return s, b - (s - a)


@_rounding_to_its_format
def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``s + e == a + b`` exactly, s = RN(a + b). Any order of magnitude. 6 operations.

    Requires s finite and |b| < Omega: with b = Omega, ``s - a`` can overflow although s does not (e5m2:
    -12288 + 57344). float8_e4m3fn, which saturates, needs neither. Knuth, TAOCP 2, 4.2.2; Boldo, Graillat, Muller 2017.
    """
    s = a + b
    b_virtual = s - a
    return s, (a - (s - b_virtual)) + (b - b_virtual)


def two_prod(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``p + e == a * b`` exactly, p = RN(a * b). 3 operations, two of them in a wider format.

    Requires p finite, not saturated, and lsb(a) * lsb(b) >= the smallest subnormal, lsb(x) being the weight of x's last
    non-zero bit: below that no p + e is a * b, and e is RN of the error. The wider product (float32, or float64 for
    float32) is exact, so no fma is needed; an fma in float32 rounded to F would be a double rounding.
    """
    p = _product(a, b)
    wide = torch.float64 if a.dtype == torch.float32 else torch.float32
    error = a.to(wide) * b.to(wide) - p.to(wide)
    return p, rn(error.to(torch.float32), a.dtype)


def renormalize(x: Expansion, n: int | None = None) -> Expansion:
    """The same number with components that do not overlap, |x[i+1]| <= ulp(x[i]) / 2, cut to the first ``n``.

    k passes of two_sum from the smallest of k components up (VecSum; Ogita, Rump, Oishi 2005): 6 k (k-1) operations.
    k - 1 passes would leave components up to an ulp of their predecessor, or after a zero; for k = 2 one pass is
    enough: 6 operations. Exact before the cut, which drops at most half an ulp of the last component kept. Requires
    what `two_sum` requires; for more than three components magnitudes must decrease, though neighbours may overlap.
    """
    terms = list(x)
    for _ in range(len(terms) if len(terms) > 2 else 1):
        for i in range(len(terms) - 1, 0, -1):
            terms[i - 1], terms[i] = two_sum(terms[i - 1], terms[i])
    return tuple(terms[: n or len(terms)])


def _collect(orders: list[list[Tensor]], n: int) -> Expansion:
    """Sum terms sorted by order of magnitude: exactly down to the last order, which takes the errors of all others."""
    components = []
    for k, terms in enumerate(orders):
        total = terms[0]
        for term in terms[1:]:
            if k + 1 < len(orders):
                total, error = two_sum(total, term)
                orders[k + 1].append(error)
            else:
                total = _sum(total, term)
        components.append(total)
    return renormalize(tuple(components), n)


def grow(x: Expansion, a: Tensor) -> Expansion:
    """``x + a``. Collage, Algorithm 1 (Grow), with two_sum where the paper's Fast2Sum would need |x| >= |a|.

    Relative error <= 2 u**n for n components (for two: Joldes et al., algorithm 4, DWPlusFP). 13 operations for two,
    49 for three.

    >>> one, tiny = torch.tensor(1.0).bfloat16(), torch.tensor(2.0**-12).bfloat16()
    >>> grow((one, torch.zeros_like(one)), tiny)
    (tensor(1., dtype=torch.bfloat16), tensor(0.0002, dtype=torch.bfloat16))
    """
    head, *rest = x
    return _collect([[head, a], *([c] for c in rest)], len(x))


def add(x: Expansion, y: Expansion) -> Expansion:
    """``x + y``, both of n components: relative error <= 2 u**n, even under cancellation.

    One order more than is kept is computed, hence it is below the 3 u**2 / (1 - 4u) of Joldes et al., algorithm 6,
    AccurateDWPlusDW. 56 operations for two components, 111 for three.
    """
    return _collect([*([a, b] for a, b in zip(x, y, strict=True)), [torch.zeros_like(x[-1])]], len(x))


def scale(x: Expansion, a: Tensor) -> Expansion:
    """``x * a`` for one float a, with relative error <= 3 u**n (for two components: Joldes et al., algorithm 8).

    The error grows by at most n/2 of the smallest subnormal where products are small. 11 operations for two components.
    Requires that the leading product and its ulp do not overflow.
    """
    return mul(x, (a,))


def mul(x: Expansion, y: Expansion) -> Expansion:
    """``x * y``, to x's number of components. As Collage multiplies v by beta2; products below the last order
    kept are dropped. Relative error <= 5 u**2 for two components (Joldes et al., algorithm 10, DWTimesDW1), 8 u**3 for
    three.

    The error grows by at most n (n+1) / 4 of the smallest subnormal where products are small: no product then has all
    its bits. 13 operations for two components. Requires that the leading product and its ulp do not overflow.
    """
    n = len(x)
    orders: list[list[Tensor]] = [[] for _ in x]
    errors: list[list[Tensor]] = [[] for _ in x]
    for i, a in enumerate(x):
        for j, b in enumerate(y[: n - i]):
            if i + j + 1 < n:
                p, e = two_prod(a, b)
                errors[i + j + 1].append(e)
            else:
                p = _product(a, b)
            orders[i + j].append(p)
    return _collect([products + e for products, e in zip(orders, errors, strict=True)], n)
