"""The one walk: every rule, format and size goes through it. One program takes one block of 1,024 elements.

A launch covers all tensors of a batch: `blocks` says which tensor a program's block is of; `table` has a row for each.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import Real
from collage.backends.triton.formats import Format
from collage.backends.triton.language import Row
from collage.backends.triton.random import bits, words, words_of_run

BLOCK = tl.constexpr(1024)

# Ways to the elements of a block: all there, in order, aligned to 16 bytes (so a thread moves 16 bytes at once); in
# order under a mask; by sizes and strides.
WHOLE, MASKED, STRIDED = (tl.constexpr(way) for way in range(3))

# A row of the table, all int64: elements; number of the first block; which row of constants and stream of random bits;
# index of the first element in the unsharded tensor; whether the tensors are contiguous and begin at multiples of 16
# bytes; where in `shapes` sizes and strides stand, and how many dimensions (none: contiguous); the same of the place in
# the unsharded tensor (none: one run of it); elements in a row, for planes with a word per block of one. Then the
# addresses of the gradient and of all planes: TENSORS of them.
NUMEL, FIRST, ROW, OFFSET, ALIGNED, LAYOUT, DIMS, REGION, REGION_DIMS, WIDTH, ADDRESSES = (
    tl.constexpr(k) for k in range(11)
)


@dataclass(frozen=True, repr=False)
class Slot(Row):
    """A rule's slot in a batch: its format, which of the row's addresses is its first plane's, its random bits."""

    format: Format
    first: int
    part: int


@triton.jit
def step(
    table, blocks, shapes, constants, streams, sums,
    RULE: tl.constexpr, SLOTS: tl.constexpr, GRADIENT: tl.constexpr, ROUND: tl.constexpr, MAXIMIZE: tl.constexpr,
    RANDOM: tl.constexpr, TENSORS: tl.constexpr, BY_ROWS: tl.constexpr, REST: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """One step of all elements of all tensors.

    sums: [programs, 5] float64, if measured. REST: the way to what is not a whole block, MASKED or STRIDED.
    """
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * (ADDRESSES + TENSORS)
    begin, end = span(row, program, BY_ROWS)
    c = constants + tl.load(row + ROW) * RULE.columns
    stream = streams + tl.load(row + ROW)
    out = sums + program.to(tl.int64) * 5
    if (tl.load(row + ALIGNED) != 0) & (begin + BLOCK <= end):
        block(
            row,
            begin,
            end,
            shapes,
            c,
            stream,
            out,
            RULE,
            SLOTS,
            GRADIENT,
            ROUND,
            MAXIMIZE,
            RANDOM,
            BY_ROWS,
            MEASURED,
            WHOLE,
        )
    else:
        block(
            row,
            begin,
            end,
            shapes,
            c,
            stream,
            out,
            RULE,
            SLOTS,
            GRADIENT,
            ROUND,
            MAXIMIZE,
            RANDOM,
            BY_ROWS,
            MEASURED,
            REST,
        )


@triton.jit
def span(row, program, BY_ROWS: tl.constexpr):
    """(first element of a program's block, end of those it may take): of the tensor, or of one row of it."""
    index = program - tl.load(row + FIRST)
    numel = tl.load(row + NUMEL)
    if BY_ROWS:
        width = tl.load(row + WIDTH)
        a_row = tl.cdiv(width, BLOCK)
        start = index // a_row * width
        return start + index % a_row * BLOCK, start + width
    else:
        return index * BLOCK, numel


@triton.jit
def block(
    row, begin, end, shapes, c, stream, out,
    RULE: tl.constexpr, SLOTS: tl.constexpr, GRADIENT: tl.constexpr, ROUND: tl.constexpr, MAXIMIZE: tl.constexpr,
    RANDOM: tl.constexpr, BY_ROWS: tl.constexpr, MEASURED: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """One block."""
    at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
    mask = at < end
    planes = ()
    for k in tl.static_range(len(SLOTS)):
        planes = planes + (load(row, at, mask, shapes, SLOTS[k], WAY),)
    raw = read(row, 0, at, mask, shapes, GRADIENT, WAY)
    g = Real(ROUND(-raw if MAXIMIZE else raw), ROUND)
    numbers = ()
    for k in tl.static_range(len(SLOTS)):
        numbers = numbers + (SLOTS[k].format.number(planes[k], ROUND, SLOTS[k].format),)
    delta, numbers = RULE.update(numbers, g, constants_of(c, RULE, ROUND))
    word = at
    if RANDOM:
        word = random_words(row, stream, begin, at, shapes, WAY)
    for k in tl.static_range(len(SLOTS)):
        random = bits(word, SLOTS[k].part) if SLOTS[k].format.stochastic else at
        codes = SLOTS[k].format.encode(numbers[k], random, mask, SLOTS[k].format)
        store(row, at, mask, shapes, codes, SLOTS[k], WAY)
        if MEASURED and k == 0:
            measure(out, mask, delta, planes[0], decoded(codes, SLOTS[0].format), SLOTS[0].format)


@triton.jit
def constants_of(c, RULE: tl.constexpr, ROUND: tl.constexpr):
    """A row of folded constants, by their names. An expansion takes two numbers of it, hi and lo."""
    values = ()
    for k in tl.static_range(len(RULE.widths)):
        if RULE.widths[k] == 2:
            values = values + ((Real(tl.load(c), ROUND), Real(tl.load(c + 1), ROUND)),)
        else:
            values = values + (Real(tl.load(c), ROUND),)
        c += RULE.widths[k]
    return RULE.constants(*values)


@triton.jit
def load(row, at, mask, shapes, SLOT: tl.constexpr, WAY: tl.constexpr):
    """What a slot's planes hold, as its format reads it."""
    planes = ()
    for p in tl.static_range(len(SLOT.format.words)):
        planes = planes + (read(row, SLOT.first + p, at, mask, shapes, SLOT.format.words[p], WAY),)
    return planes


@triton.jit
def store(row, at, mask, shapes, codes, SLOT: tl.constexpr, WAY: tl.constexpr):
    for p in tl.static_range(len(SLOT.format.words)):
        write(row, SLOT.first + p, at, mask, shapes, codes[p], SLOT.format.words[p], WAY)


@triton.jit
def decoded(codes, FORMAT: tl.constexpr):
    """What planes will hold, as their format reads it."""
    planes = ()
    for p in tl.static_range(len(FORMAT.words)):
        planes = planes + (FORMAT.words[p].decode(codes[p]),)
    return planes


@triton.jit
def read(row, TENSOR: tl.constexpr, at, mask, shapes, WORD: tl.constexpr, WAY: tl.constexpr):
    """A plane's elements, decoded."""
    x = fetch(row, TENSOR, at, mask, shapes, WORD, WAY)
    return WORD.decode(x if WORD.memory == tl.float32 else x.to(tl.int32))


@triton.jit
def fetch(row, TENSOR: tl.constexpr, at, mask, shapes, WORD: tl.constexpr, WAY: tl.constexpr):
    pointer = tl.load(row + ADDRESSES + TENSOR).to(tl.pointer_type(WORD.memory))
    if WAY == WHOLE:
        return tl.load(tl.multiple_of(pointer, 16) + at)
    else:
        return tl.load(pointer + place(row, TENSOR, at, shapes, WAY), mask=mask, other=0)


@triton.jit
def write(row, TENSOR: tl.constexpr, at, mask, shapes, code, WORD: tl.constexpr, WAY: tl.constexpr):
    pointer = tl.load(row + ADDRESSES + TENSOR).to(tl.pointer_type(WORD.memory))
    if WAY == WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at, code.to(WORD.memory))
    else:
        tl.store(pointer + place(row, TENSOR, at, shapes, WAY), code.to(WORD.memory), mask=mask)


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
def measure(out, mask, delta, old, new, FORMAT: tl.constexpr):
    """The monitor's sums over one block (reference.measure): intended, arrived and visible update, in float64."""
    intended = tl.where(mask, delta.x, 0.0).to(tl.float64)
    visible = difference(mask, new[0], old[0])
    before, after = FORMAT.components(old, FORMAT), FORMAT.components(new, FORMAT)
    arrived = tl.zeros([BLOCK], tl.float64)
    for k in tl.static_range(1, len(before) + 1):
        arrived += difference(mask, after[len(before) - k], before[len(before) - k])
    moved = new[0] != old[0]
    for p in tl.static_range(1, len(old)):
        moved = moved | (new[p] != old[p])
    tl.store(out, halved(intended * arrived))
    tl.store(out + 1, halved(intended * visible))
    tl.store(out + 2, halved(intended * intended))
    nonzero = (delta.x != 0.0) & mask
    tl.store(out + 3, tl.sum(nonzero.to(tl.int32)).to(tl.float64))
    tl.store(out + 4, tl.sum((nonzero & (moved == 0)).to(tl.int32)).to(tl.float64))


@triton.jit
def difference(mask, new, old):
    return tl.where(mask, new.to(tl.float64) - old.to(tl.float64), 0.0)


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
def broken(table, blocks, shapes, counts, SLOT: tl.constexpr, TENSORS: tl.constexpr, REST: tl.constexpr):
    """How many elements of a slot, in each block, have planes that no step could have left."""
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * (ADDRESSES + TENSORS)
    begin, end = span(row, program, False)
    at = begin + tl.arange(0, BLOCK)
    planes = load(row, at, at < end, shapes, SLOT, REST)
    tl.store(counts + program, tl.sum(SLOT.format.broken(planes, SLOT.format).to(tl.int32)))


@triton.jit
def stream(table, blocks, zero, SLOTS: tl.constexpr, GRADIENT: tl.constexpr, TENSORS: tl.constexpr):
    """The limit of a step: reads and writes the planes of whole blocks, without arithmetic. zero holds a 0.

    What is written depends on what was read, the gradient included: no compiler can leave it out.
    """
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * (ADDRESSES + TENSORS)
    begin, end = span(row, program, False)
    at = tl.multiple_of(begin, BLOCK) + tl.arange(0, BLOCK)
    if begin + BLOCK <= end:
        g = read(row, 0, at, at, zero, GRADIENT, WHOLE).to(tl.int32, bitcast=True) & tl.load(zero)
        for k in tl.static_range(len(SLOTS)):
            for p in tl.static_range(len(SLOTS[k].format.words)):
                stream_plane(row, SLOTS[k].first + p, at, g, SLOTS[k].format.words[p])


@triton.jit
def stream_plane(row, TENSOR: tl.constexpr, at, g, WORD: tl.constexpr):
    x = fetch(row, TENSOR, at, at, at, WORD, WHOLE)
    if WORD.memory == tl.float32:
        write(row, TENSOR, at, at, at, (x.to(tl.int32, bitcast=True) | g).to(tl.float32, bitcast=True), WORD, WHOLE)
    else:
        write(row, TENSOR, at, at, at, x | g.to(WORD.memory), WORD, WHOLE)
