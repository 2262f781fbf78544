"""Sums: the monitor's of a block while it is stepped, and of a tensor's blocks."""

import triton
import triton.language as tl


@triton.jit
def measure(out, mask, delta, old, codes, FORMAT: tl.constexpr):
    """The monitor's sums over one block (reference.measure): intended, arrived and visible update, in float64."""
    new = decoded(codes, FORMAT)
    intended = tl.where(mask, delta, 0.0).to(tl.float64)
    before, after = FORMAT.components(old, FORMAT), FORMAT.components(new, FORMAT)
    arrived = tl.zeros_like(intended)
    for k in tl.static_range(1, len(before) + 1):
        arrived += difference(mask, after[len(before) - k], before[len(before) - k])
    if FORMAT.whole_rows:  # words differ under another scale, numbers only where it cut some
        visible = difference(mask, new[0] * new[len(new) - 1], old[0] * old[len(old) - 1])
        moved = after[0] != before[0]
    else:
        visible = difference(mask, new[0], old[0])
        moved = new[0] != old[0]
        for p in tl.static_range(1, len(old)):
            if FORMAT.per[p] == 1:
                moved = moved | (new[p] != old[p])
    tl.store(out, halved(intended * arrived))
    tl.store(out + 1, halved(intended * visible))
    tl.store(out + 2, halved(intended * intended))
    nonzero = (delta != 0.0) & mask
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
def decoded(codes, FORMAT: tl.constexpr):
    """What planes will hold, as their format reads it."""
    planes = ()
    for p in tl.static_range(len(FORMAT.words)):
        planes = planes + (FORMAT.words[p].decode(codes[p]),)
    return planes


AT_ONCE = tl.constexpr(32)


@triton.jit
def add_up(sums, first, totals):
    """totals[tensor] += the sums of its blocks, one after another. first: [tensors + 1], number of its first block."""
    tensor = tl.program_id(0)
    lane = tl.arange(0, 8)
    total = tl.load(totals + tensor * 5 + lane, mask=lane < 5, other=0.0)
    at = sums + tl.load(first + tensor) * 5 + lane
    count = tl.load(first + tensor + 1) - tl.load(first + tensor)
    for _ in range(count // AT_ONCE):
        some = ()
        for k in tl.static_range(AT_ONCE):  # all under way before the first is waited for
            some = some + (tl.load(at + 5 * k, mask=lane < 5, other=0.0),)
        for k in tl.static_range(AT_ONCE):
            total += some[k]
        at += 5 * AT_ONCE
    for _ in range(count % AT_ONCE):
        total += tl.load(at, mask=lane < 5, other=0.0)
        at += 5
    tl.store(totals + tensor * 5 + lane, total, mask=lane < 5)


@triton.jit
def add_up_halved(sums, first, totals):
    """totals[tensor] <- the sums of its blocks: again in blocks, halved pairwise, and these one after another."""
    tensor = tl.program_id(0)
    begin, end = tl.load(first + tensor), tl.load(first + tensor + 1)
    total = tl.zeros([1], tl.float64)
    for k in range(tl.cdiv(end - begin, 1024)):
        at = begin + k * 1024 + tl.arange(0, 1024)
        total += halved(tl.load(sums + at, mask=at < end, other=0.0))
    tl.store(totals + tensor + tl.arange(0, 1), total)
