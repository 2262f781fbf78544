"""What else walks planes: decoding and encoding them, counting edits, squares, streaming without arithmetic."""

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import Real, bits_of, float_of, same
from collage.backends.triton.format import FP32, largest, magnitudes, sizes
from collage.backends.triton.memory import (
    ALIGNED,
    BLOCK,
    MASKED,
    WHOLE,
    fetch,
    load,
    read,
    shared,
    store,
    write,
)
from collage.backends.triton.numbers import Register
from collage.backends.triton.sums import halved
from collage.backends.triton.walk import random_bits, random_words, span


@triton.jit
def decode(table, owners, shapes, PLAN: tl.constexpr):
    """The float32 numbers that planes stand for, written where a step would read gradients."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    run = span(row, program, PLAN)
    at = run.begin + tl.arange(0, BLOCK)
    planes = load(row, at, run, shapes, PLAN.slots[0], PLAN.rest)
    x = PLAN.slots[0].format.decode(planes, PLAN.slots[0].format)
    write(row, 0, at, at < run.end, shapes, x, FP32, PLAN.rest)


@triton.jit
def maxima(table, owners, shapes, tops, PLAN: tl.constexpr):
    """Of each row the largest finite magnitude, as bits, where the program with its first block counts."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    run = span(row, program, PLAN)
    at = run.begin + tl.arange(0, BLOCK)
    x = read(row, 0, at, at < run.end, shapes, FP32, PLAN.rest)
    largest = magnitudes(tl.max(sizes(x, at < run.end)))
    tl.atomic_max(tops + head(program, run), largest, sem="relaxed")


@triton.jit
def head(program, run):
    """The program that has the first block of a program's row."""
    return program - (run.begin - run.start) // BLOCK


@triton.jit
def encode(table, owners, shapes, streams, tops, PLAN: tl.constexpr):
    """Planes that hold float32 numbers, read where a step would read gradients. tops: of `maxima`, where rows have."""
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * PLAN.columns
    run = span(row, program, PLAN)
    at = run.begin + tl.arange(0, BLOCK)
    x = read(row, 0, at, at < run.end, shapes, FP32, PLAN.rest)
    word = at
    if PLAN.shared:
        word = random_words(row, tl.load(streams + owner), run.begin, at, shapes, PLAN.rest)
    random = random_bits(word, row, streams + owner, run.begin, at, shapes, PLAN.slots[0], PLAN.rest)
    number = Register(Real(x, same))
    most = largest(number, at < run.end, PLAN.slots[0].format)
    if PLAN.slots[0].format.whole_rows:
        most = (tl.load(tops + head(program, run) + tl.arange(0, 1)),)
    codes = PLAN.slots[0].format.encode(number, random, most, PLAN.slots[0].format)
    store(row, at, run, shapes, codes, PLAN.slots[0], PLAN.rest)


@triton.jit
def broken(table, owners, shapes, counts, PLAN: tl.constexpr):
    """How many elements, in each block, have planes that no step could have left."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    run = span(row, program, PLAN)
    at = run.begin + tl.arange(0, BLOCK)
    planes = load(row, at, run, shapes, PLAN.slots[0], PLAN.rest)
    apart = PLAN.slots[0].format.broken(planes, PLAN.slots[0].format) & (at < run.end)
    tl.store(counts + program, tl.sum(apart.to(tl.int32)))


@triton.jit
def squares(table, owners, shapes, sums, PLAN: tl.constexpr):
    """The sum of the squares of each block of gradients, which stand where a step's first plane does."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    run = span(row, program, PLAN)
    if (tl.load(row + ALIGNED) != 0) & (run.begin + BLOCK <= run.end):
        tl.store(sums + program, squares_of_block(row, run, shapes, PLAN, WHOLE))
    else:
        tl.store(sums + program, squares_of_block(row, run, shapes, PLAN, PLAN.rest))


@triton.jit
def squares_of_block(row, run, shapes, PLAN: tl.constexpr, WAY: tl.constexpr):
    at = run.begin + tl.arange(0, BLOCK)
    x = read(row, 1, at, at < run.end, shapes, PLAN.gradient, WAY).to(tl.float64)
    return halved(x * x)


@triton.jit
def stream(table, owners, zero, PLAN: tl.constexpr):
    """The limit of a step: reads and writes the planes of whole blocks, without arithmetic. zero holds a 0.

    What is written depends on what was read, the gradient included: no compiler can leave it out.
    """
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    run = span(row, program, PLAN)
    at = run.begin + tl.arange(0, BLOCK)
    if run.begin + BLOCK <= run.end:
        nothing = tl.load(zero)
        g = (bits_of(read(row, 0, at, at, zero, PLAN.gradient, WHOLE)) >> 16) & nothing  # below may be no bits
        for k in tl.static_range(len(PLAN.slots)):
            for p in tl.static_range(len(PLAN.slots[k].format.words)):
                if PLAN.slots[k].format.per[p] == 1:
                    stream_plane(row, at, at, g, PLAN.slots[k], p, WHOLE)
                else:
                    where, mask = shared(row, run, PLAN.slots[k].format.per[p])
                    stream_plane(row, where, mask, nothing, PLAN.slots[k], p, MASKED)


@triton.jit
def stream_plane(row, at, mask, g, SLOT: tl.constexpr, P: tl.constexpr, WAY: tl.constexpr):
    WORD: tl.constexpr = SLOT.format.words[P]
    x = fetch(row, SLOT.first + P, at, mask, at, WORD, WAY)
    if WORD.memory == tl.float32:
        write(row, SLOT.first + P, at, mask, at, float_of(bits_of(x) | g), WORD, WAY)
    else:
        write(row, SLOT.first + P, at, mask, at, x | g.to(WORD.memory), WORD, WAY)
