"""The random bits: reproducible, a function of every part of the counter, unbiased and uncorrelated.

Every statistic is a z-score, nearly standard normal for ideal bits, over 2**16 to 2**20 values. Seeds are fixed, so the
tests are deterministic; ideal bits exceed Z = 5.5 with probability 3.8e-8 per statistic.
There are about 11,000 in all, so that ideal bits would pass every test with probability 0.999.
"""

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from collage.rng import Stream, key_of

Z = 5.5
N = 1 << 18
INDEX = torch.arange(N)
STREAM = Stream(seed=7, step=1000, key=key_of("transformer.h.0.attn.c_attn.weight"))
SLOTS = ("param", "exp_avg", "exp_avg_sq", "average")


def bits(slot: str = "param", stream: Stream = STREAM, index: Tensor = INDEX) -> Tensor:
    return stream.bits(index, slot)


def correlation(x: Tensor, y: Tensor) -> float:
    """z of the correlation of two uniform 16-bit samples."""
    scale = ((1 << 32) - 1) / 12  # the variance
    x, y = (t.double() - ((1 << 16) - 1) / 2 for t in (x, y))
    return float((x * y).sum() / scale) / x.numel() ** 0.5


def parities(x: Tensor, y: Tensor) -> Tensor:
    """z of the agreement of each bit of x with each bit of y: 16 by 16."""
    shifts = torch.arange(16)[:, None]
    a, b = ((((t >> shifts) & 1) * 2 - 1).float() for t in (x, y))
    return a @ b.T / x.numel() ** 0.5


def chi_square(cells: Tensor, number: int) -> float:
    """z of Pearson's statistic (normal approximation; hundreds of degrees of freedom or more)."""
    expected = cells.numel() / number
    x = float(((torch.bincount(cells.flatten(), minlength=number).double() - expected) ** 2).sum() / expected)
    return (x - (number - 1)) / (2 * (number - 1)) ** 0.5


def test_bits_are_16_bit_integers_of_the_shape_of_the_index():
    for slot in SLOTS:
        x = bits(slot)
        assert x.dtype == torch.int32
        assert 0 <= int(x.min()) < int(x.max()) < 1 << 16
        assert bits(slot, index=INDEX.view(512, -1)).shape == (512, N // 512)
        assert bits(slot, index=INDEX[:0]).shape == (0,)
        assert bits(slot, index=INDEX[5]).shape == ()


def test_bits_are_reproducible():
    """Here, in another process and on another machine: a change of these numbers changes every stochastic run."""
    assert torch.equal(bits(), bits())
    assert key_of("wte") == 0xEF2AFEE622591C5A
    stream = Stream(seed=0, step=1, key=key_of("wte"))
    got = [stream.bits(torch.arange(2), slot).tolist() for slot in SLOTS]
    assert got == [[39238, 40713], [56324, 33000], [28074, 52464], [51440, 21004]]


def test_keys_of_names_and_positions():
    names = [f"layers.{i}.weight" for i in range(10_000)]
    assert len({key_of(name) for name in names}) == len(names)
    assert key_of(3) == 3
    assert key_of("3") != 3


@pytest.mark.parametrize(
    "other",
    [
        Stream(8, 1000, STREAM.key), Stream(7, 1001, STREAM.key), Stream(7, 1000, STREAM.key ^ 1),
        Stream(1000, 7, STREAM.key), Stream(7, STREAM.key, 1000), Stream(7 + (1 << 32), 1000, STREAM.key),
    ],
    ids=["seed", "step", "key", "seed and step exchanged", "step and key exchanged", "seed + 2**32"],
)  # fmt: skip
def test_every_part_of_the_counter_gives_unrelated_bits(other):
    """Two 16-bit values are equal with probability 2**-16: 4 +- 2 of 2**18; 25 has probability 1e-12."""
    for slot in SLOTS:
        x, y = bits(slot), bits(slot, other)
        assert int((x == y).sum()) < 25
        assert abs(correlation(x, y)) < Z
        assert float(parities(x, y).abs().max()) < Z


def test_neighbouring_steps_seeds_and_positions_are_unrelated():
    """Counters that differ by one, as they do in training: steps, seeds, and parameters without names."""
    families = (
        [Stream(0, step, 0) for step in range(1, 9)],
        [Stream(seed, 1, 0) for seed in range(8)],
        [Stream(0, 1, key) for key in range(8)],
    )
    index = torch.arange(1 << 16)
    for family in families:
        samples = [bits("param", stream, index) for stream in family]
        for x, y in combinations(samples, 2):
            assert abs(correlation(x, y)) < Z


def test_one_element_over_the_steps():
    """What one weight sees: 4,096 steps of 64 elements. Mean, and correlation from one step to the next."""
    x = torch.stack([bits("param", Stream(0, step, key_of("w")), torch.arange(64)) for step in range(1, 4097)])
    scale = (((1 << 32) - 1) / 12) ** 0.5
    means = (x.double().mean(0) - ((1 << 16) - 1) / 2) / scale * x.shape[0] ** 0.5
    assert float(means.abs().max()) < Z
    for lag in range(1, 17):
        assert abs(correlation(x[lag:].flatten(), x[:-lag].flatten())) < Z


@pytest.mark.parametrize("slot", SLOTS)
def test_mean_and_every_bit_are_unbiased(slot):
    x = bits(slot)
    scale = (((1 << 32) - 1) / 12) ** 0.5
    assert abs(float(x.double().mean()) - ((1 << 16) - 1) / 2) / scale * N**0.5 < Z
    ones = ((x >> torch.arange(16)[:, None]) & 1).sum(1)
    assert float((ones - N / 2).abs().max()) / (N / 4) ** 0.5 < Z


@pytest.mark.parametrize("slot", SLOTS)
def test_all_16_bit_values_are_equally_frequent(slot):
    """Chi-square over 65,536 values, 16 expected in each. Too even a histogram is a fault as well."""
    x = bits(slot, index=torch.arange(1 << 20))
    assert abs(chi_square(x, 1 << 16)) < Z


@pytest.mark.parametrize("slot", SLOTS)
def test_neighbours_are_uncorrelated(slot):
    """At lags of rows of many widths too. And pairs of neighbours fill the square evenly, by their high 7 bits."""
    x = bits(slot)
    for lag in (
        *range(1, 33),
        48,
        63,
        64,
        65,
        100,
        127,
        128,
        255,
        256,
        257,
        512,
        768,
        1000,
        1024,
        3072,
        4096,
        50257,
        65536,
    ):
        assert abs(correlation(x[lag:], x[:-lag])) < Z, lag
    for lag in (1, 2, 64, 1024):
        assert float(parities(x[lag:], x[:-lag]).abs().max()) < Z, lag
    assert abs(chi_square((x[1:] >> 9) * 128 + (x[:-1] >> 9), 1 << 14)) < Z


@pytest.mark.parametrize("stride", [2, 3, 1 << 10, 768, 50257, 1 << 16])
def test_columns_are_unbiased_and_uncorrelated(stride):
    """Elements a constant stride apart, as in a column of a matrix, beyond 2**32 too."""
    for slot in SLOTS:
        x = bits(slot, index=torch.arange(1 << 16) * stride)
        ones = ((x >> torch.arange(16)[:, None]) & 1).sum(1)
        assert float((ones - x.numel() / 2).abs().max()) / (x.numel() / 4) ** 0.5 < Z
        assert abs(correlation(x[1:], x[:-1])) < Z
        assert abs(chi_square(x >> 6, 1 << 10)) < Z


def test_every_bit_of_the_index_reaches_every_bit():
    """Avalanche: flipping one of the 32 low bits of the index flips each bit of the result half of the time."""
    index = torch.randint(0, 1 << 32, (1 << 15,), generator=torch.Generator().manual_seed(0))
    for slot in SLOTS:
        x = bits(slot, index=index)
        for k in range(32):
            flipped = ((x ^ bits(slot, index=index ^ (1 << k))) >> torch.arange(16)[:, None]) & 1
            z = (flipped.sum(1) - index.numel() / 2).abs() / (index.numel() / 4) ** 0.5
            assert float(z.max()) < Z, (slot, k)


@pytest.mark.parametrize(("a", "b"), list(combinations(SLOTS, 2)))
def test_slots_are_independent_in_pairs(a, b):
    """Correlation, every pair of bits, and the joint distribution: of the high 7 bits, and high against low bits."""
    x, y = bits(a), bits(b)
    assert abs(correlation(x, y)) < Z
    assert float(parities(x, y).abs().max()) < Z
    for s, t in ((x >> 9, y >> 9), (x & 127, y & 127), (x >> 9, y & 127), (x & 127, y >> 9)):
        assert abs(chi_square(s * 128 + t, 1 << 14)) < Z
    for lag in (1, 2, 3, 64, 1024):
        assert abs(correlation(x[lag:], y[:-lag])) < Z
        assert abs(correlation(y[lag:], x[:-lag])) < Z


def test_rounding_errors_of_the_slots_are_uncorrelated():
    """What the independence is for: of one fraction, which slots round up (shared bits gave 0.48)."""
    for fraction in (0.03, 0.25, 0.5, 0.9):
        limit = int(fraction * 65536)
        up = torch.stack([(bits(slot) >= (1 << 16) - limit).double() for slot in SLOTS]) - limit / 65536
        covariance = up @ up.T / N
        sigma = fraction * (1 - fraction)
        z = (covariance / sigma - torch.eye(len(SLOTS))) * N**0.5
        assert float(z[~torch.eye(len(SLOTS), dtype=torch.bool)].abs().max()) < Z


def test_indices_beyond_32_bits_continue_without_repeats():
    """Blocks of 2**32 elements have keys of their own, and an index range may cross their border."""
    start = (1 << 32) - N // 2
    across = bits(index=start + INDEX)
    assert torch.equal(across[: N // 2], bits(index=start + INDEX[: N // 2]))
    assert torch.equal(across[N // 2 :], bits(index=(1 << 32) + INDEX[: N // 2]))
    assert abs(correlation(across[1:], across[:-1])) < Z
    blocks = [bits(index=(k << 32) + INDEX) for k in range(4)]
    for x, y in combinations(blocks, 2):
        assert int((x == y).sum()) < 25
        assert abs(correlation(x, y)) < Z
    assert torch.equal(bits(index=torch.tensor([5 + (1 << 40)])), bits(index=torch.arange(10) + (1 << 40))[5:6])


def test_bits_do_not_depend_on_how_the_range_is_split():
    """Chunks of any length, any order, any shape: sharding, threads and walks see the same bits."""
    g = torch.Generator().manual_seed(0)
    for slot in SLOTS:
        whole = bits(slot)
        cuts = [0, *sorted(torch.randint(0, N, (20,), generator=g).tolist()), N]
        parts = [bits(slot, index=INDEX[i:j]) for i, j in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
        order = torch.randperm(N, generator=g)
        assert torch.equal(bits(slot, index=INDEX[order]), whole[order])
        assert torch.equal(bits(slot, index=INDEX.view(64, -1)[:, ::3]), whole.view(64, -1)[:, ::3])


def test_the_statistics_notice_poor_bits():
    """Each statistic fails on bits that lack what it measures."""
    x = bits()
    assert abs(correlation(x, x)) > Z
    assert abs(correlation(x[1:] + x[:-1] >> 1, x[1:])) > Z
    assert float(parities(x, x ^ 4).abs().max()) > Z
    assert abs(chi_square(x & ~1, 1 << 16)) > Z
    counter = (INDEX * 40503 & 0xFFFF).to(torch.int32)  # a Weyl sequence: even, but too even
    assert abs(chi_square(counter, 1 << 16)) > Z
    assert abs(correlation(counter[1:], counter[:-1])) > Z
