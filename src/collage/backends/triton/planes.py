"""What else walks planes: decoding and encoding them, counting edits, streaming them without arithmetic."""

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import Real, same
from collage.backends.triton.format import FP32
from collage.backends.triton.numbers import Register
from collage.backends.triton.walk import BLOCK, WHOLE, fetch, load, random_bits, random_words, read, span, store, write


@triton.jit
def decode(table, owners, shapes, PLAN: tl.constexpr):
    """The float32 numbers that planes stand for, written where a step would read gradients."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    begin, end = span(row, program, PLAN)
    at = begin + tl.arange(0, BLOCK)
    planes = load(row, at, begin, end, shapes, PLAN.slots[0], PLAN.rest)
    x = PLAN.slots[0].format.decode(planes, PLAN.slots[0].format)
    write(row, 0, at, at < end, shapes, x, FP32, PLAN.rest)


@triton.jit
def encode(table, owners, shapes, streams, PLAN: tl.constexpr):
    """Planes that hold float32 numbers, read where a step would read gradients."""
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * PLAN.columns
    begin, end = span(row, program, PLAN)
    at = begin + tl.arange(0, BLOCK)
    x = read(row, 0, at, at < end, shapes, FP32, PLAN.rest)
    word = at
    if PLAN.shared:
        word = random_words(row, tl.load(streams + owner), begin, at, shapes, PLAN.rest)
    random = random_bits(word, row, streams + owner, begin, at, shapes, PLAN.slots[0], PLAN.rest)
    number = Register(Real(x, same))
    codes = PLAN.slots[0].format.encode(number, random, at < end, PLAN.slots[0].format)
    store(row, at, begin, end, shapes, codes, PLAN.slots[0], PLAN.rest)


@triton.jit
def broken(table, owners, shapes, counts, PLAN: tl.constexpr):
    """How many elements, in each block, have planes that no step could have left."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    begin, end = span(row, program, PLAN)
    at = begin + tl.arange(0, BLOCK)
    planes = load(row, at, begin, end, shapes, PLAN.slots[0], PLAN.rest)
    apart = PLAN.slots[0].format.broken(planes, PLAN.slots[0].format) & (at < end)
    tl.store(counts + program, tl.sum(apart.to(tl.int32)))


@triton.jit
def stream(table, owners, zero, PLAN: tl.constexpr):
    """The limit of a step: reads and writes the planes of whole blocks, without arithmetic. zero holds a 0.

    What is written depends on what was read, the gradient included: no compiler can leave it out.
    """
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * PLAN.columns
    begin, end = span(row, program, PLAN)
    at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
    if begin + BLOCK <= end:
        g = read(row, 0, at, at, zero, PLAN.gradient, WHOLE).to(tl.int32, bitcast=True) & tl.load(zero)
        for k in tl.static_range(len(PLAN.slots)):
            for p in tl.static_range(len(PLAN.slots[k].format.words)):
                if PLAN.slots[k].format.per[p] == 1:
                    stream_plane(row, PLAN.slots[k].first + p, at, g, PLAN.slots[k].format.words[p])


@triton.jit
def stream_plane(row, TENSOR: tl.constexpr, at, g, WORD: tl.constexpr):
    x = fetch(row, TENSOR, at, at, at, WORD, WHOLE)
    if WORD.memory == tl.float32:
        write(row, TENSOR, at, at, at, (x.to(tl.int32, bitcast=True) | g).to(tl.float32, bitcast=True), WORD, WHOLE)
    else:
        write(row, TENSOR, at, at, at, x | g.to(WORD.memory), WORD, WHOLE)
