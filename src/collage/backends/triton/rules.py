"""The update rules, as in rules/*.py. RULES is the table."""

from __future__ import annotations

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import add, div, mul, sqrt
from collage.backends.triton.numbers import grown, scaled, scaled_kind, value


@triton.jit
def adamw(
    g, c, theta_a, theta_b, m_a, m_b, v_a, v_b,
    THETA: tl.constexpr, M: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """AdamW as in Collage's Algorithm 2. c: address of its folded constants; theta, m, v: numbers and their kinds.

    Returns the intended update, then the new numbers; the kinds of m and v are those of scaled ones.
    """
    m_a, m_b = scaled(m_a, m_b, tl.load(c), tl.load(c + 1), M, NARROW)
    m_a, m_b = grown(m_a, m_b, mul(tl.load(c + 2), g, NARROW), scaled_kind(M), NARROW)
    v_a, v_b = scaled(v_a, v_b, tl.load(c + 3), tl.load(c + 4), V, NARROW)
    v_a, v_b = grown(v_a, v_b, mul(tl.load(c + 5), mul(g, g, NARROW), NARROW), scaled_kind(V), NARROW)
    ratio = div(
        mul(tl.load(c + 6), value(m_a, m_b, scaled_kind(M)), NARROW),
        add(sqrt(value(v_a, v_b, scaled_kind(V)), NARROW), tl.load(c + 7), NARROW),
        NARROW,
    )
    delta = -add(ratio, mul(tl.load(c + 8), value(theta_a, theta_b, THETA), NARROW), NARROW)
    theta_a, theta_b = grown(theta_a, theta_b, delta, THETA, NARROW)
    return delta, theta_a, theta_b, m_a, m_b, v_a, v_b


RULES = {"adamw": adamw}
