"""A block's elements of every plane, between memory and registers: by a table of what each tensor is."""

import triton
import triton.language as tl

from collage.backends.triton.format import PER_ROW
from collage.backends.triton.language import aggregate

BLOCK = tl.constexpr(1024)
VECTOR = tl.constexpr(16)  # elements: of planes of any word, as many lie at multiples of 16 bytes

# Ways to the elements of a block: all there, in order, aligned to 16 bytes (so a thread moves 16 bytes at once); in
# order under a mask; by sizes and strides.
WHOLE, MASKED, STRIDED = (tl.constexpr(way) for way in range(3))

# A row of the table, all int64: elements; number of the first block; which row of constants; index of the first element
# in the unsharded tensor; whether the tensors are contiguous and begin at multiples of 16 bytes; where in `shapes`
# sizes and strides stand, and how many dimensions (none: contiguous); the same of the place in the unsharded tensor
# (none: one run of it); elements of a row, or of all rows together where those that share a word lie so too. Then
# addresses: of the gradient (or what is decoded or encoded), and of all planes.
NUMEL, FIRST, ROW, OFFSET, ALIGNED, LAYOUT, DIMS, REGION, REGION_DIMS, WIDTH, ADDRESSES = (
    tl.constexpr(k) for k in range(11)
)


@aggregate
class Span:
    """A program's block: its first element, and the end of those it may take. The number of its row, and where that
    begins."""

    begin: tl.tensor
    end: tl.tensor
    line: tl.tensor
    start: tl.tensor


@triton.jit
def load(row, at, run, shapes, SLOT: tl.constexpr, WAY: tl.constexpr):
    """What a slot's planes hold, as its format reads it."""
    planes = ()
    for p in tl.static_range(len(SLOT.format.words)):
        if SLOT.format.per[p] == 1:
            x = read(row, SLOT.first + p, at, at < run.end, shapes, SLOT.format.words[p], WAY)
        else:
            where, mask = shared(row, run, SLOT.format.per[p])
            x = read(row, SLOT.first + p, where, mask, shapes, SLOT.format.words[p], MASKED)
        planes = planes + (x,)
    return planes


@triton.jit
def store(row, at, run, shapes, codes, SLOT: tl.constexpr, WAY: tl.constexpr):
    for p in tl.static_range(len(SLOT.format.words)):
        if SLOT.format.per[p] == 1:
            write(row, SLOT.first + p, at, at < run.end, shapes, codes[p], SLOT.format.words[p], WAY)
        elif SLOT.format.per[p] == PER_ROW:  # with its last block
            lane = tl.arange(0, 1)
            last = run.begin + BLOCK + lane >= run.end
            write(row, SLOT.first + p, run.line + lane, last, shapes, codes[p], SLOT.format.words[p], MASKED)
        else:
            where, mask = shared(row, run, SLOT.format.per[p])
            write(row, SLOT.first + p, where, mask, shapes, codes[p], SLOT.format.words[p], MASKED)


@triton.jit
def shared(row, run, PER: tl.constexpr):
    """(offsets of a block's words in a plane with one for PER elements of a row, which of them there are)."""
    if PER == PER_ROW:
        lane = tl.arange(0, 1)
        return run.line + lane, lane == 0
    else:
        lane = tl.arange(0, BLOCK // PER)
        first = run.line * tl.cdiv(tl.load(row + WIDTH), PER) + (run.begin - run.start) // PER
        return first + lane, run.begin + lane * PER < run.end


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
