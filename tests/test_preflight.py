"""`collage preflight` against exact rationals, on every kind of file it reads, and its errors."""

import argparse
import itertools
import json
import math
import random
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from collage.advice import counting
from collage.harness.preflight import shown
from collage.harness.preflight.command import add_arguments, run
from collage.harness.preflight.examine import examine

LR = 1e-5


def nearest(x, precision, smallest=-149):
    """x rounded to so many significant bits, but to no less than 2**smallest, ties to even (nothing overflows)."""
    if x == 0:
        return x
    exponent = math.frexp(float(x))[1]
    exponent += abs(x) >= Fraction(2) ** exponent  # float(x) may have been rounded
    exponent -= abs(x) < Fraction(2) ** (exponent - 1)
    quantum = Fraction(2) ** max(exponent - precision, smallest)
    return round(x / quantum) * quantum


def bf16(x):
    return nearest(x, 8, -133)


def fp16(x):
    return nearest(x, 11, -24)


def fp32(x):
    return nearest(x, 24)


def moves_bf16(w, d):
    return bf16(fp32(bf16(w) + d)) != bf16(w)


def moves_fp32(w, d):
    return fp32(w + d) != w


def moves_two(w, d, low=bf16):
    hi = low(w)
    lo = low(w - hi)
    r = fp32(lo + d)
    h = low(fp32(hi + r))
    return (h, low(fp32(fp32(hi - h) + r))) != (hi, lo)


def moves_fp16x2(w, d):
    return moves_two(w, d, fp16)


def moves_kahan(w, d):
    theta = bf16(w)
    c = bf16(w - theta)
    y = bf16(bf16(d) + c)
    s = bf16(theta + y)
    return (s, bf16(bf16(theta - s) + y)) != (theta, c)


def moves_bf16_sr(w, d):
    """Some random bits let through whatever part of the sum the float32 register kept."""
    return fp32(bf16(w) + d) != bf16(w)


def moves_bf16x2_sr(w, d):
    hi = bf16(w)
    lo = bf16(w - hi)
    r = fp32(lo + d)
    h = bf16(fp32(hi + r))
    return (h, fp32(fp32(hi - h) + r)) != (hi, lo)


def moves_24_bits_sr(w, d):
    """Of a word of 24 bits, 16 of them significant: likewise."""
    theta = nearest(w, 16)
    return fp32(theta + d) != theta


MOVES = {
    "bf16": moves_bf16, "bf16x2": moves_two, "bf16+kahan": moves_kahan, "fp32": moves_fp32, "bf16+fp32": moves_fp32,
    "bf16:sr": moves_bf16_sr, "bf16x2:sr": moves_bf16x2_sr, "fp16x2": moves_fp16x2,
    "bf16+int16": moves_fp32, "bf16+int8:sr": moves_24_bits_sr,
}  # fmt: skip


def cannot_move(name, weights, lr):
    d = fp32(Fraction(lr))
    moves = MOVES[name]
    return sum(not moves(w, d) and not moves(w, -d) for w in map(Fraction, weights.double().flatten().tolist()))


def sample_weights(n, seed=0):
    """Weights around every threshold: in all binades from 2**-14 to 2**9, powers of two and their neighbours, zero."""
    rng = random.Random(seed)
    powers = [
        s * 2.0**e * (1 + k * 2.0**-p) for e, s, k, p in itertools.product(range(-14, 10), (1, -1), (-1, 0, 1), (9, 23))
    ]
    normal = [rng.choice((1, -1)) * rng.uniform(1, 2) * 2.0 ** rng.randint(-14, 9) for _ in range(n)]
    return torch.tensor([0.0, 1.0, *powers, *normal])


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(arg) for arg in argv])


@pytest.fixture
def model(tmp_path):
    """Two layers' worth of names, one of each kind, and what must be left out."""
    tensors = {
        "transformer.wte.weight": torch.full((8, 4), 0.02),
        "transformer.h.0.ln_1.weight": torch.tensor([1.0, 1.0, 0.5, 1e-4]),
        "transformer.h.0.ln_1.bias": torch.zeros(4),
        "transformer.h.0.attn.c_attn.weight": torch.full((4, 12), 1e-3),
        "transformer.h.0.mlp.c_fc.weight": torch.full((4, 16), -0.3),
        "lm_head.weight": torch.full((8, 4), 0.02),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "quantised.qweight": torch.ones(5, 5, dtype=torch.int32),
        "eight.weight": torch.ones(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lr", [1e-3, 1e-5, 1.7e-6, 1e-8])
def test_counts_equal_exact_arithmetic(tmp_path, monkeypatch, dtype, lr):
    monkeypatch.setattr(counting, "CHUNK", 500)  # several chunks; for the 16-bit ones the count of distinct values
    weights = sample_weights(300).repeat(2).to(dtype)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    total = examine(tmp_path / "w.safetensors", lr).total
    assert total.weights == weights.numel()
    assert total.stuck == {name: cannot_move(name, weights, lr) for name in MOVES}


def test_every_kind_is_counted_and_the_rest_skipped(model):
    found = examine(model[0], LR)
    counts = {kind: tally.weights for kind, tally in found.kinds.items()}
    assert counts == {"embedding": 32, "attention": 48, "mlp": 64, "norm": 4, "bias": 4, "head": 32}
    assert {kind: tally.stuck["bf16"] for kind, tally in found.kinds.items()} == {
        "embedding": 32, "attention": 0, "mlp": 64, "norm": 3, "bias": 0, "head": 32,
    }  # fmt: skip
    assert found.kinds["norm"].exactly_one == 2
    assert (found.skipped_tensors, found.skipped_values) == (3, 64 + 25 + 3)
    assert found.total.stuck["bf16x2"] == 0


def test_decay_below_the_floor_reaches_only_the_weights_with_a_small_mantissa(tmp_path):
    # Half an ulp of bf16 is 2**-8 of 1.008, 2**-9 of 1.0 (going down) and 2**-9 of 1.99.
    weights = torch.tensor([1.0, 129 / 128, -129 / 128 * 2.0**-5, 255 / 128, 0.0])
    save_file({"w": weights}, tmp_path / "w.safetensors")
    for w, expected in ((1e-4, 4), (3e-3, 2), (5e-3, 0)):
        total = examine(tmp_path / "w.safetensors", lr=1e-2, weight_decay=w * 100).total
        assert (total.nonzero, total.undecayed["bf16"]) == (4, expected)
    assert examine(tmp_path / "w.safetensors", lr=1e-5, weight_decay=0.1).total.undecayed["bf16x2"] == 4
    # In fp16x2 the floor of small weights is 2**-25 itself
    small = torch.tensor([2.0**-10, 2.0**-8, 2.0**-5, 1.0, 2.0**-30])
    save_file({"w": small}, tmp_path / "small.safetensors")
    for w, expected in ((2.0**-14, 1), (2.0**-16, 2), (2.0**-18, 3), (2.0**-25, 5)):
        assert examine(tmp_path / "small.safetensors", 1.0, w).total.undecayed["fp16x2"] == expected
    assert examine(tmp_path / "w.safetensors", lr=1e-4, weight_decay=0.1).total.undecayed["bf16x2"] == 0


def test_the_same_model_from_every_kind_of_file(model, tmp_path):
    file, tensors = model
    expected = examine(file, LR, 0.1)
    assert expected.total.weights == 184
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "model": tensors, "optimizer": {"state": {}}}, tmp_path / "checkpoint.ckpt")
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    for folder, suffix, save in ((sharded, "safetensors", save_file), (pickled, "bin", torch.save)):
        folder.mkdir()
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        shard_of = {name: f"{stem}-{i % 2 + 1}-of-2.{suffix}" for i, name in enumerate(tensors)}
        for shard in set(shard_of.values()):
            save({name: t for name, t in tensors.items() if shard_of[name] == shard}, folder / shard)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": shard_of}), encoding="utf-8")
    index = sharded / "model.safetensors.index.json"
    for path in (
        tmp_path,
        tmp_path / "plain.pt",
        tmp_path / "checkpoint.ckpt",
        sharded,
        pickled,
        index,
    ):
        found = examine(path, LR, 0.1)
        assert found.kinds == expected.kinds, path
        assert found.skipped_values == expected.skipped_values, path


def test_weights_that_are_not_finite_are_left_out(tmp_path, capsys):
    save_file({"w": torch.tensor([1.0, math.inf, math.nan])}, tmp_path / "w.safetensors")
    found = examine(tmp_path / "w.safetensors", LR)
    assert (found.total.weights, found.not_finite) == (1, 2)
    run(arguments(tmp_path / "w.safetensors", "--lr", LR))
    assert "Left out: 2 weights that are Inf or NaN." in capsys.readouterr().out


def test_run_prints_the_verdict_and_writes_the_numbers(model, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    assert run(arguments(model[0], "--lr", "1e-5", "--weight-decay", "0.1", "--json", target)) == 0
    printed = capsys.readouterr().out
    numbers = json.loads(target.read_text(encoding="utf-8"))
    assert numbers["verdict"] == [
        "A step of 1e-5 cannot move 71.2 % of the weights in bf16; bf16x2 loses 0 %.",
        "A decay of 1e-5 × 0.1 = 1e-6 per step comes to nothing in bf16, bf16x2 and bf16+kahan "
        "and reaches only a part of the weights in fp16x2.",
        "2 of 4 norm weights are still exactly 1.0, where they began, and stay there in bf16.",
    ]
    for line in (*numbers["verdict"], "Skipped: 3 tensor(s), 92 values", "norm weights"):
        assert line in printed
    assert numbers["total"]["cannot_move"]["bf16"] == pytest.approx((32 + 64 + 3 + 32) / 184)
    assert numbers["kinds"]["norm"]["cannot_move"]["bf16"] == 0.75
    assert numbers["kinds"]["norm"]["exactly_one"] == 2
    assert numbers["kinds"]["bias"]["not_decayed"]["bf16"] is None  # all zero
    assert numbers["floors"]["bf16"]["up"] == pytest.approx(2**-8, rel=1e-4)


def test_a_share_says_zero_and_all_only_when_it_is():
    shares = [shown.share(*c) for c in ((0, 9), (1, 10**6), (1, 1000), (935, 1000), (999_999, 10**6), (7, 7), (0, 0))]
    assert shares == ["0 %", "<0.01 %", "0.1 %", "93.5 %", ">99.99 %", "100 %", "–"]


def test_threads_are_given_back(model):
    before = torch.get_num_threads()
    examine(model[0], LR)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("flags", "message"), [
    (("--lr", "0"), "--lr: must be a positive number, got 0"),
    (("--lr=-1e-5",), "--lr: must be a positive number, got -1e-05"),
    (("--lr", "nan"), "--lr: must be a positive number, got nan"),
    (("--lr", "1e-5", "--json", "/nope/x.json"), "--json '/nope/x.json': no folder /nope"),
    (("--lr", "1e-5", "--weight-decay", "-1"), "--weight-decay: must be zero or positive, got -1"),
])  # fmt: skip
def test_senseless_settings_are_refused(model, flags, message):
    with pytest.raises(ValueError, match=message):
        run(arguments(model[0], *flags))


def test_a_model_without_weights_is_refused(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.int64)}, tmp_path / "integers.safetensors")
    with pytest.raises(ValueError, match=r"no floating-point weights in it \(1 other tensors\)"):
        run(arguments(tmp_path / "integers.safetensors", "--lr", LR))
