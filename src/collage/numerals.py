"""Numbers as people read them, one way wherever they are shown. What was not measured is a dash."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"


def fixed(value: float | None, digits: int, sign: str = "") -> str:
    """So many digits after the point; sign="+" for a difference. Never minus zero.

    >>> fixed(1234.5, 0), fixed(-0.04567, 4, "+"), fixed(-1e-9, 2, "+"), fixed(None, 4)
    ('1,234', '−0.0457', '+0.00', '–')
    """
    return MISSING if value is None else _minus(f"{round(value, digits) + 0.0:{sign},.{digits}f}")


def short(value: float | None, digits: int = 4) -> str:
    """So many significant digits, as people write them.

    >>> short(1e-5), short(2.5e-6), short(8.0), short(13.523, 3)
    ('1e-5', '2.5e-6', '8', '13.5')
    """
    return MISSING if value is None else _minus(f"{value:.{digits}g}")


def scientific(value: float | None) -> str:
    """Two significant digits and a power of ten; "none" for zero: a floor.

    >>> scientific(2**-9), scientific(0.0)
    ('2.0e-3', 'none')
    """
    return MISSING if value is None else _minus(f"{value:.1e}") if value else "none"


def percent(share: float | None, least: int = 0) -> str:
    """As many digits as it takes not to call almost all "all", or almost nothing "nothing", and at least so many.

    >>> [percent(share) for share in (1.0, 0.9982, 0.999999, 0.07, 0.00001, 0.0)]
    ['100 %', '99.8 %', '>99.99 %', '7 %', '<0.01 %', '0 %']
    """
    if share is None:
        return MISSING
    value = round(100 * share, 9)
    away = min(abs(value), abs(100 - value))
    if not away:
        return f"{value:.0f} %"
    if away < 0.005 and 0 < value < 100:
        return "<0.01 %" if value < 1 else ">99.99 %"
    digits = next((d for d in (0, 1, 2) if 0.5 * 10**-d <= away), 2)
    return f"{fixed(value, max(digits, least))} %"


def listed(names: Sequence[str]) -> str:
    """A, B and C."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _minus(text: str) -> str:
    """A real minus sign, but a hyphen in an exponent, which loses its zero."""
    return text.replace("e-0", "e-") if "e" in text else text.replace("-", "−")
