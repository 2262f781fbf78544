"""The one walk: every rule, format and size goes through it. One program takes one block of 1,024 elements.

A launch covers all tensors of a batch: `blocks` says which tensor a program's block is of; `table` has a row for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import rn
from collage.backends.triton.formats import (
    BF16,
    FP32,
    MASTER,
    SINGLE,
    STRIDED,
    WHOLE,
    encode,
    is_broken,
    kind_of,
    load,
    read,
    value_of,
    write,
)
from collage.backends.triton.numbers import scaled_kind
from collage.backends.triton.random import bits, words, words_of_run

BLOCK = tl.constexpr(1024)

# A row of the table, all int64: addresses of two planes per slot and of the gradient; elements; number of the first
# block; which row of constants and stream of random bits; index of the first element in the unsharded tensor; whether
# the tensors are contiguous and begin at multiples of 16 bytes; where in `shapes` sizes and strides stand, and how many
# dimensions (none: contiguous); the same of the place in the unsharded tensor (none: one run of it).
TENSORS = 7
GRAD, NUMEL, FIRST, ROW, OFFSET, ALIGNED, LAYOUT, DIMS, REGION, REGION_DIMS = (tl.constexpr(k) for k in range(6, 16))
COLUMNS = tl.constexpr(16)


@triton.jit
def step(
    table, blocks, shapes, constants, streams, sums,
    UPDATE: tl.constexpr, CONSTANTS: tl.constexpr, THETA: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    GRADIENT: tl.constexpr, NARROW: tl.constexpr, MAXIMIZE: tl.constexpr, RANDOM: tl.constexpr, REST: tl.constexpr,
    MEASURED: tl.constexpr,
):  # fmt: skip
    """One step of all elements of all tensors.

    sums: [programs, 5] float64, if measured. REST: the way to what is not a whole block, MASKED or STRIDED.
    """
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * COLUMNS
    begin = (program - tl.load(row + FIRST)) * BLOCK
    c = constants + tl.load(row + ROW) * CONSTANTS
    stream = streams + tl.load(row + ROW)
    out = sums + program.to(tl.int64) * 5
    if (tl.load(row + ALIGNED) != 0) & (begin + BLOCK <= tl.load(row + NUMEL)):
        block(
            row, begin, shapes, c, stream, out, UPDATE, THETA, M, V, GRADIENT, NARROW, MAXIMIZE, RANDOM, MEASURED, WHOLE
        )
    else:
        block(
            row, begin, shapes, c, stream, out, UPDATE, THETA, M, V, GRADIENT, NARROW, MAXIMIZE, RANDOM, MEASURED, REST
        )


@triton.jit
def block(
    row, begin, shapes, c, stream, out,
    UPDATE: tl.constexpr, THETA: tl.constexpr, M: tl.constexpr, V: tl.constexpr, GRADIENT: tl.constexpr,
    NARROW: tl.constexpr, MAXIMIZE: tl.constexpr, RANDOM: tl.constexpr, MEASURED: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """One block."""
    at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
    mask = at < tl.load(row + NUMEL)
    t_hi, t_lo = load_slot(row, 0, at, mask, shapes, THETA, WAY)
    m_hi, m_lo = load_slot(row, 1, at, mask, shapes, M, WAY)
    v_hi, v_lo = load_slot(row, 2, at, mask, shapes, V, WAY)
    raw = read(tl.load(row + GRAD), place(row, 6, at, shapes, WAY), mask, GRADIENT, WAY)
    g = rn(-raw if MAXIMIZE else raw, NARROW)
    t_a, t_b = number(t_hi, t_lo, THETA)
    m_a, m_b = number(m_hi, m_lo, M)
    v_a, v_b = number(v_hi, v_lo, V)
    delta, t_a, t_b, m_a, m_b, v_a, v_b = UPDATE(
        g, c, t_a, t_b, m_a, m_b, v_a, v_b, kind_of(THETA, NARROW), kind_of(M, NARROW), kind_of(V, NARROW), NARROW
    )
    word = at
    if RANDOM:
        word = random_words(row, stream, begin, at, shapes, WAY)
    new_hi, new_lo = store_slot(row, 0, at, mask, shapes, t_a, t_b, word, kind_of(THETA, NARROW), THETA, RANDOM, WAY)
    store_slot(row, 1, at, mask, shapes, m_a, m_b, word, scaled_kind(kind_of(M, NARROW)), M, RANDOM, WAY)
    store_slot(row, 2, at, mask, shapes, v_a, v_b, word, scaled_kind(kind_of(V, NARROW)), V, RANDOM, WAY)
    if MEASURED:
        measure(out, mask, delta, t_hi, t_lo, new_hi, new_lo, THETA)


@triton.jit
def number(hi, lo, FORMAT: tl.constexpr):
    """Planes as a number: for a master weight that is the second plane alone."""
    if FORMAT % 4 == MASTER:
        return lo, lo
    else:
        return hi, lo


@triton.jit
def load_slot(row, SLOT: tl.constexpr, at, mask, shapes, FORMAT: tl.constexpr, WAY: tl.constexpr):
    first = place(row, 2 * SLOT, at, shapes, WAY)
    return load(row + 2 * SLOT, first, place(row, 2 * SLOT + 1, at, shapes, WAY), mask, FORMAT, WAY)


@triton.jit
def store_slot(
    row, SLOT: tl.constexpr, at, mask, shapes, a, b, word,
    KIND: tl.constexpr, FORMAT: tl.constexpr, RANDOM: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """Round a number into its planes. Returns what they now hold, as float32."""
    random = bits(word, SLOT) if RANDOM else at
    hi, lo = encode(a, b, random, KIND, FORMAT)
    write(tl.load(row + 2 * SLOT), place(row, 2 * SLOT, at, shapes, WAY), mask, hi, FORMAT % 16 // 4 * 4, WAY)
    new_hi = value_of(hi, FORMAT % 16 // 4 * 4)
    if FORMAT % 4 == SINGLE:
        return new_hi, new_hi
    else:
        other = place(row, 2 * SLOT + 1, at, shapes, WAY)
        if FORMAT % 4 == MASTER:
            write(tl.load(row + 2 * SLOT + 1), other, mask, lo, FP32, WAY)
            return new_hi, lo
        else:
            write(tl.load(row + 2 * SLOT + 1), other, mask, lo, BF16, WAY)
            return new_hi, value_of(lo, BF16)


@triton.jit
def place(row, TENSOR: tl.constexpr, at, shapes, WAY: tl.constexpr):
    """Offset of each element in a tensor: in order, or by its sizes and strides."""
    if WAY != STRIDED:
        return at
    else:
        dims = tl.load(row + DIMS)
        sizes = shapes + tl.load(row + LAYOUT)
        return dot(at, dims, sizes, sizes + dims * (TENSOR + 1))


@triton.jit
def dot(at, dims, sizes, strides):
    """The coordinates of each element times strides. Without dimensions, as it is."""
    total = tl.where(dims == 0, at, 0)
    rest = at.to(tl.uint32)  # a 64-bit division would be a call, and cost every path its registers
    for k in range(dims):
        d = dims - 1 - k
        size = tl.load(sizes + d).to(tl.uint32)
        total += (rest % size).to(tl.int64) * tl.load(strides + d)
        rest = rest // size
    return total


@triton.jit
def random_words(row, stream, begin, at, shapes, WAY: tl.constexpr):
    """32 random bits for each element, by its row-major index in the unsharded tensor."""
    base = tl.load(stream).to(tl.uint64, bitcast=True)
    offset = tl.load(row + OFFSET)
    if WAY != STRIDED:
        return words_of_run(base, offset + begin, tl.arange(0, BLOCK))
    else:
        dims = tl.load(row + REGION_DIMS)
        sizes = shapes + tl.load(row + REGION)
        return words(base, offset + dot(at, dims, sizes, sizes + dims))


@triton.jit
def measure(out, mask, delta, old_hi, old_lo, new_hi, new_lo, THETA: tl.constexpr):
    """The monitor's sums over one block (reference.measure): intended, arrived and visible update, in float64."""
    intended = tl.where(mask, delta, 0.0).to(tl.float64)
    visible = tl.where(mask, new_hi.to(tl.float64) - old_hi.to(tl.float64), 0.0)
    arrived = visible
    moved = new_hi != old_hi
    if THETA % 4 != SINGLE:
        arrived = tl.where(mask, new_lo.to(tl.float64) - old_lo.to(tl.float64), 0.0)
        moved = moved | (new_lo != old_lo)
        if THETA % 4 != MASTER:
            arrived += visible
    tl.store(out, halved(intended * arrived))
    tl.store(out + 1, halved(intended * visible))
    tl.store(out + 2, halved(intended * intended))
    nonzero = (delta != 0.0) & mask
    tl.store(out + 3, tl.sum(nonzero.to(tl.int32)).to(tl.float64))
    tl.store(out + 4, tl.sum((nonzero & (moved == 0)).to(tl.int32)).to(tl.float64))


@triton.jit
def halved(x):
    """The sum of a block by pairwise halving, x[:half] + x[half:]. Two numbers have one sum, whatever reduces them."""
    for level in tl.static_range(10):
        x = tl.sum(tl.reshape(x, [2, 512 >> level]), axis=0)
    return tl.sum(x)


@triton.jit
def add_up(sums, first, totals):
    """totals[tensor] += the sums of its blocks, one after another. first: [tensors + 1], number of its first block."""
    tensor = tl.program_id(0)
    lane = tl.arange(0, 8)
    total = tl.load(totals + tensor * 5 + lane, mask=lane < 5, other=0.0)
    at = sums + tl.load(first + tensor) * 5 + lane
    for _ in range(tl.load(first + tensor + 1) - tl.load(first + tensor)):
        total += tl.load(at, mask=lane < 5, other=0.0)
        at += 5
    tl.store(totals + tensor * 5 + lane, total, mask=lane < 5)


@triton.jit
def broken(table, blocks, shapes, counts, THETA: tl.constexpr, REST: tl.constexpr):
    """How many elements of theta, in each block, have planes that no step could have left."""
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * COLUMNS
    begin = (program - tl.load(row + FIRST)) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    hi, lo = load_slot(row, 0, at, at < tl.load(row + NUMEL), shapes, THETA, REST)
    tl.store(counts + program, tl.sum(is_broken(hi, lo, THETA).to(tl.int32)))


@triton.jit
def stream(
    table, blocks, zero, THETA: tl.constexpr, M: tl.constexpr, V: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The limit of a step: reads and writes the planes of whole blocks, without arithmetic. zero holds a 0."""
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * COLUMNS
    begin = (program - tl.load(row + FIRST)) * BLOCK
    at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
    if begin + BLOCK <= tl.load(row + NUMEL):
        g = read(tl.load(row + GRAD), at, at, GRADIENT, WHOLE).to(tl.int32, bitcast=True) & tl.load(zero)
        stream_slot(row, at, g, THETA)
        stream_slot(row + 2, at, g, M)
        stream_slot(row + 4, at, g, V)


@triton.jit
def stream_slot(planes, at, g, FORMAT: tl.constexpr):
    """What is written depends on what was read, the gradient included: no compiler can leave it out."""
    hi, lo = load(planes, at, at, at, FORMAT, WHOLE)
    write_back(tl.load(planes), at, hi, g, FORMAT % 16 // 4 * 4)
    if FORMAT % 4 == MASTER:
        write_back(tl.load(planes + 1), at, lo, g, FP32)
    elif FORMAT % 4 != SINGLE:
        write_back(tl.load(planes + 1), at, lo, g, BF16)


@triton.jit
def write_back(plane, at, x, g, COMPONENT: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True) | g
    if COMPONENT == FP32:
        write(plane, at, at, bits.to(tl.float32, bitcast=True), FP32, WHOLE)
    else:
        write(plane, at, at, bits >> 16, BF16, WHOLE)
