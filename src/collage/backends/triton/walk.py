"""The one walk: every rule, format and size goes through it. One program takes one block of 1,024 elements.

A launch covers all tensors of a batch: `owners` says which tensor a program's block is of; `table` has a row for each.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from collage.backends.triton.arithmetic import Real, negative, same
from collage.backends.triton.format import largest, magnitudes, sizes
from collage.backends.triton.language import Row
from collage.backends.triton.memory import (
    ALIGNED,
    BLOCK,
    FIRST,
    NUMEL,
    OFFSET,
    REGION,
    REGION_DIMS,
    ROW,
    STRIDED,
    VECTOR,
    WHOLE,
    WIDTH,
    Span,
    dot,
    load,
    read,
    store,
)
from collage.backends.triton.random import bits, salted, words, words_of_run
from collage.backends.triton.sums import measure


@dataclass(frozen=True, eq=False, repr=False)
class Slot(Row):
    """A slot of a batch: its format; which of a row's addresses is its first plane's; what bits it draws (rng.Draw)."""

    format: Any
    first: int
    written: bool = True
    salt: int = 0
    part: int = 0

    @property
    def stochastic(self) -> bool:
        return bool(getattr(self.format, "value", self.format).stochastic)

    @property
    def takes_rows(self) -> bool:
        """Whether it is written with a word for a whole row, by what has seen all of that."""
        return self.written and bool(getattr(self.format, "value", self.format).whole_rows)


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Row):
    """What makes one kernel differ from another.

    gradient: its word, or None. ROUND: to the arithmetic. shared: a stochastic slot draws from the stream itself.
    by_rows: blocks do not cross runs of WIDTH elements, because a plane has words for several elements of a row.
    whole_rows: a plane that is written has a word for all elements of a row, so that one program takes the row.
    rest: the way to what is not a whole block, MASKED or STRIDED.
    """

    slots: tuple[Any, ...]
    columns: int  # of the table
    rest: int
    by_rows: bool = False
    whole_rows: bool = False
    gradient: Any = None
    rule: Any = None
    ROUND: Any = same
    scaled: bool = False
    maximize: bool = False
    skips: bool = False
    shared: bool = False
    measured: bool = False


@triton.jit
def step(table, owners, shapes, constants, streams, scale, skip, sums, PLAN: tl.constexpr):
    """One step of all elements of all tensors.

    constants: [distinct steps, rule's] float32; streams: [tensors] int64; scale: of the gradients; skip: not 0 if
    nothing is to be done; sums: [programs, 5] float64, if measured.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * PLAN.columns
    run = span(row, program, PLAN)
    if PLAN.skips:
        run = Span(run.begin, tl.where(tl.load(skip) != 0, 0, run.end), run.line, run.start)
    c = constants + tl.load(row + ROW) * PLAN.rule.columns
    out = sums + program.to(tl.int64) * 5
    if PLAN.whole_rows:
        if (run.begin == run.start) & (run.begin < run.end):
            whole_row(row, run, shapes, c, streams + owner, scale, out, PLAN)
    else:
        some_block(row, run, shapes, c, streams + owner, scale, out, (), PLAN)


@triton.jit
def whole_row(row, run, shapes, c, stream, scale, out, PLAN: tl.constexpr):
    """All blocks of a row: read for its largest numbers, then once more, most likely from a cache, and stepped."""
    tops = ()
    for k in tl.static_range(len(PLAN.slots)):
        if PLAN.slots[k].takes_rows:
            tops = tops + (largest_of_row(row, run, shapes, c, scale, PLAN, k),)
        else:
            tops = tops + ((),)
    whole, blocks = counts(row, run)
    for k in tl.range(whole, disable_licm=True):
        block(row, part(run, k), shapes, c, stream, scale, out + 5 * k, tops, PLAN, WHOLE)
    for k in tl.range(whole, blocks, disable_licm=True):
        block(row, part(run, k), shapes, c, stream, scale, out + 5 * k, tops, PLAN, PLAN.rest)


@triton.jit
def counts(row, run):
    """(blocks of a row that are whole, and lie so that they can be taken as such; all of its blocks)"""
    length = run.end - run.start
    return tl.where(tl.load(row + ALIGNED) != 0, length // BLOCK, 0), tl.cdiv(length, BLOCK)


@triton.jit
def part(run, k):
    """Block k of a row."""
    return Span(run.start + k * BLOCK, run.end, run.line, run.start)


@triton.jit
def largest_of_row(row, run, shapes, c, scale, PLAN: tl.constexpr, K: tl.constexpr):
    """`largest` of a slot's new numbers, for the plane with a word for all of a row."""
    most = tl.zeros([BLOCK], tl.uint32)
    whole, blocks = counts(row, run)
    for k in tl.range(whole, disable_licm=True):
        most = tl.maximum(most, sizes_of_block(row, part(run, k), shapes, c, scale, PLAN, K, WHOLE))
    for k in tl.range(whole, blocks, disable_licm=True):
        most = tl.maximum(most, sizes_of_block(row, part(run, k), shapes, c, scale, PLAN, K, PLAN.rest))
    return (magnitudes(tl.max(tl.reshape(most, [1, BLOCK]), axis=1)),)


@triton.jit
def sizes_of_block(row, run, shapes, c, scale, PLAN: tl.constexpr, K: tl.constexpr, WAY: tl.constexpr):
    at, mask = elements(run, PLAN, WAY)
    planes = planes_of(row, at, run, shapes, PLAN, WAY)
    numbers, _ = advance(row, at, mask, shapes, c, scale, planes, PLAN, WAY)
    return sizes(numbers[K].value().x, mask)


@triton.jit
def some_block(row, run, shapes, c, stream, scale, out, tops, PLAN: tl.constexpr):
    """One block, by the way that it can be reached."""
    if (tl.load(row + ALIGNED) != 0) & (run.begin + BLOCK <= run.end):
        block(row, run, shapes, c, stream, scale, out, tops, PLAN, WHOLE)
    else:
        block(row, run, shapes, c, stream, scale, out, tops, PLAN, PLAN.rest)


@triton.jit
def span(row, program, PLAN: tl.constexpr):
    index = program - tl.load(row + FIRST)
    if PLAN.by_rows:
        width = tl.load(row + WIDTH)
        blocks = tl.cdiv(width, BLOCK).to(tl.uint32)
        line = index.to(tl.uint32) // blocks  # a 64-bit division would be a call
        start = line.to(tl.int64) * width
        return Span(start + (index - line.to(tl.int64) * blocks) * BLOCK, start + width, line.to(tl.int64), start)
    else:
        return Span(index * BLOCK, tl.load(row + NUMEL), index - index, index - index)  # one row


@triton.jit
def block(row, run, shapes, c, stream, scale, out, tops, PLAN: tl.constexpr, WAY: tl.constexpr):
    """One block. tops: of each slot the largest of the row, if that is walked whole."""
    at, mask = elements(run, PLAN, WAY)
    planes = planes_of(row, at, run, shapes, PLAN, WAY)
    numbers, delta = advance(row, at, mask, shapes, c, scale, planes, PLAN, WAY)
    begin = first(run, PLAN, WAY)
    word = at
    if PLAN.shared:
        word = random_words(row, tl.load(stream), begin, at, shapes, WAY)
    for late in tl.static_range(2):  # words of rows take the most registers: after the others, which then are free
        for k in tl.static_range(len(PLAN.slots)):
            if PLAN.slots[k].written and PLAN.slots[k].takes_rows == late:
                random = random_bits(word, row, stream, begin, at, shapes, PLAN.slots[k], WAY)
                most = largest(numbers[k], mask, PLAN.slots[k].format) if late == 0 else tops[k]
                codes = PLAN.slots[k].format.encode(numbers[k], random, most, PLAN.slots[k].format)
                if late == 1:
                    tl.debug_barrier()  # no warp writes a word of the row before every other has read it
                store(row, at, run, shapes, codes, PLAN.slots[k], WAY)
                if PLAN.measured and k == 0:
                    measure(out, mask, delta.x, planes[0], codes, PLAN.slots[0].format)


@triton.jit
def elements(run, PLAN: tl.constexpr, WAY: tl.constexpr):
    """(indices of a block's elements, which of them are of the tensor, or of a row of it)"""
    at = first(run, PLAN, WAY) + tl.arange(0, BLOCK)
    return at, within(at, run, WAY)


@triton.jit
def first(run, PLAN: tl.constexpr, WAY: tl.constexpr):
    if PLAN.by_rows and WAY == WHOLE:
        return run.begin // VECTOR * VECTOR  # it is a multiple: this says so
    else:
        return run.begin


@triton.jit
def planes_of(row, at, run, shapes, PLAN: tl.constexpr, WAY: tl.constexpr):
    """What every slot's planes hold."""
    planes = ()
    for k in tl.static_range(len(PLAN.slots)):
        planes = planes + (load(row, at, run, shapes, PLAN.slots[k], WAY),)
    return planes


@triton.jit
def advance(row, at, mask, shapes, c, scale, planes, PLAN: tl.constexpr, WAY: tl.constexpr):
    """The rule's (new numbers of every slot, intended update)."""
    g = ()
    if PLAN.gradient is not None:
        g = gradient(row, at, mask, shapes, scale, PLAN, WAY)
    numbers = ()
    for k in tl.static_range(len(PLAN.slots)):
        numbers = numbers + (PLAN.slots[k].format.number(planes[k], PLAN.ROUND, PLAN.slots[k].format),)
    return PLAN.rule.update(numbers, g, constants_of(c, PLAN))


@triton.jit
def within(at, run, WAY: tl.constexpr):
    """Which elements are of the tensor, or of a row of it."""
    if WAY == WHOLE:
        return tl.full([BLOCK], True, tl.int1)
    else:
        return at < run.end


@triton.jit
def gradient(row, at, mask, shapes, scale, PLAN: tl.constexpr, WAY: tl.constexpr):
    """As a rule reads it: unscaled in float32, then rounded to a register."""
    g = read(row, 0, at, mask, shapes, PLAN.gradient, WAY)
    if PLAN.scaled:
        g = tl.div_rn(g, tl.load(scale))
    return Real(PLAN.ROUND(negative(g) if PLAN.maximize else g), PLAN.ROUND)


@triton.jit
def constants_of(c, PLAN: tl.constexpr):
    """A row of folded constants, by their names. An expansion takes two numbers of it, hi and lo."""
    values = ()
    for k in tl.static_range(len(PLAN.rule.widths)):
        if PLAN.rule.widths[k] == 2:
            values = values + ((Real(tl.load(c), PLAN.ROUND), Real(tl.load(c + 1), PLAN.ROUND)),)
        else:
            values = values + (Real(tl.load(c), PLAN.ROUND),)
        c += PLAN.rule.widths[k]
    return PLAN.rule.constants(*values)


@triton.jit
def random_bits(word, row, stream, begin, at, shapes, SLOT: tl.constexpr, WAY: tl.constexpr):
    """16 for each element, of the word that slots share, or of the slot's own."""
    if not SLOT.format.stochastic:
        return at
    elif SLOT.salt == 0:
        return bits(word, SLOT.part)
    else:
        return bits(random_words(row, salted(tl.load(stream), SLOT.salt), begin, at, shapes, WAY), SLOT.part)


@triton.jit
def random_words(row, base, begin, at, shapes, WAY: tl.constexpr):
    """32 random bits for each element, by its row-major index in the unsharded tensor."""
    base = base.to(tl.uint64, bitcast=True)
    offset = tl.load(row + OFFSET)
    if WAY != STRIDED:
        return words_of_run(base, offset + begin, tl.arange(0, BLOCK))
    else:
        dims = tl.load(row + REGION_DIMS)
        sizes = shapes + tl.load(row + REGION)
        return words(base, offset + dot(at, dims, sizes, sizes + dims))
