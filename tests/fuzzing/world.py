"""A model, its optimizer and what watches them, and what must be true of them after every action."""

from __future__ import annotations

import copy
import hashlib
import io
import re
from contextlib import contextmanager

import torch
from helpers import BARE, assert_same_bits
from oracle import codes
from torch import nn

import collage
from collage.strategies import STRATEGIES, Strategy
from fuzzing.edits import EDITS
from fuzzing.expected import Book, Hyper, Sums, derived, judge, require, stored, value

SHAPES = [(), (1,), (5,), (8,), (64,), (0,), (0, 3), (3, 0), (7, 5), (3, 4, 5), (33, 31), (1025,), (2049,), (33, 130)]
LARGE = (150, 301)  # more than one chunk of the reference and than one thread's share of a kernel
BF16, F32 = torch.bfloat16, torch.float32


class World:
    """A model, its optimizer, what watches them, and a book of what is expected of each parameter."""

    def __init__(self, rng, trail):
        self.rng, self.trail, self.steps = rng, trail, 0
        self.g = torch.Generator().manual_seed(rng.getrandbits(60))
        self.named, self.made = rng.random() < 0.8, 0
        self.model, self.books, self.saved, self.ema = nn.Module(), {}, None, None
        self.mon = self.calls = self.every = self.sums = self.stepped = None
        cast, backend = rng.random() < 0.15, rng.choice(["auto", "auto", "reference"])
        groups = [self.new_group(cast) for _ in range(rng.choice([1, 1, 2]))]
        with self.casting():
            self.opt = collage.AdamW(groups, backend=backend, cast=cast, **settings(rng))
        trail(", ".join(f"{g['strategy']} {[tuple(p.shape) for p in g['params']]}" for g in self.opt.param_groups))

    # ---- parameters

    def normal(self, shape, scale=1.0):
        return torch.randn(shape, generator=self.g) * scale

    @contextmanager
    def casting(self):
        """What the body casts keeps its value, as well as its format can hold it."""
        wide = {key: p.detach().double() for key, p in self.params() if p.dtype == F32}
        yield
        for key, want in wide.items():
            p = self.model.get_parameter(key)
            if p.dtype != F32:
                now = self.planes(p)
                off = stored(self.strategy_of(p), "param", now)
                require(key, "cast value", value("param", now), want, off, want.isfinite())
                self.wrote(key)

    def new_group(self, wide=False):
        """A group of one to three parameters, laid out in one of several ways, as the constructor takes it."""
        name = self.rng.choice(list(BARE))
        shapes = [self.rng.choice(SHAPES) for _ in range(self.rng.randint(1, 3))]
        shapes += [LARGE] * (self.rng.random() < 0.05)
        scale = self.rng.choice([1.0, 1.0, 0.02, 1e-4, 100.0, 0.0])
        data = [self.normal(shape, scale).to(F32 if wide else STRATEGIES[name].dtype) for shape in shapes]
        layout = self.rng.choice(["plain", "plain", "turned", "gaps", "flat", "ones"])
        if layout == "turned":
            data = [x.t().contiguous().t() if x.dim() == 2 else x for x in data]
        elif layout == "gaps":
            data = [torch.stack([x, x], dim=-1)[..., 0] for x in data]
        elif layout == "flat" and not wide:
            whole, sizes = torch.cat([x.flatten() for x in data]), [x.numel() for x in data]
            data = [part.view(x.shape) for part, x in zip(whole.split(sizes), data, strict=True)]
        elif layout == "ones":
            data = [torch.ones_like(x) for x in data]
        if self.rng.random() < 0.1 and len(data) > 1:
            data[0] = data[0].float()  # updated in float32, beside the low ones
        params = []
        for x in data:
            key, self.made = f"w{self.made}", self.made + 1
            self.model.register_parameter(key, nn.Parameter(x))
            params.append((key, self.model.get_parameter(key)))
            self.books[key] = Book({"param": x.clone()}, x.clone())
        return {"params": params if self.named else [p for _, p in params], "strategy": name}

    def params(self):
        return self.model.named_parameters()

    def group_of(self, p):
        return next(group for group in self.opt.param_groups if any(p is other for other in group["params"]))

    def strategy_of(self, p):
        own = Strategy.parse(self.group_of(p)["strategy"])
        return own.of(p.shape) if p.dtype == own.dtype else STRATEGIES["fp32"]

    def keys_of(self, group):
        return [key for p in group["params"] for key, other in self.params() if p is other]

    def label(self, key):
        """What the optimizer calls it."""
        order = [p for group in self.opt.param_groups for p in group["params"]]
        return key if self.named else next(str(i) for i, p in enumerate(order) if p is self.model.get_parameter(key))

    def pick(self, wanted=lambda key, p: True):
        return self.rng.choice([(key, p) for key, p in self.params() if wanted(key, p)] or [(None, None)])

    # ---- what must be true after every action

    def planes(self, p):
        state = {k: v for k, v in (self.opt.state.get(p) or {}).items() if k != "step"}
        return {k: v.detach().clone() for k, v in {"param": p, **state}.items()}

    def check(self):
        """Every bit is as the books say."""
        for key, p in self.params():
            book, now, counter = self.books[key], self.planes(p), (self.opt.state.get(p) or {}).get("step", 0)
            if len(book.planes) == 1 and len(now) > 1:  # made by a step that was refused, or an export: nothing yet
                fresh = derived(now)
                book.planes = {k: fresh.get(k, torch.zeros_like(x)) for k, x in now.items()}
            if book.planes.keys() != now.keys() or int(counter) != book.step:
                expected = f"expected {sorted(book.planes)} at {book.step}"
                raise AssertionError(f"'{key}' has {sorted(now)} at step {int(counter)}, {expected}")
            for k, want in book.planes.items():
                assert_same_bits(f"'{key}'.{k}", now[k], want)
        extra = self.opt.state.keys() - set(self.model.parameters())
        assert not extra, f"state of {len(extra)} parameters that are not the optimizer's"

    def digest(self):
        """Of every bit of all planes."""
        digest = hashlib.blake2b(digest_size=8)
        for key, p in self.params():
            for name, plane in sorted(self.planes(p).items()):
                digest.update(f"{key}.{name} {codes(plane.contiguous()).tolist()}".encode())
        return digest.hexdigest()

    def wrote(self, key, step=None):
        """The optimizer wrote these planes: they are the new truth."""
        p, book = self.model.get_parameter(key), self.books[key]
        now = self.planes(p)
        self.books[key] = Book(now, now["param"], book.step if step is None else step, address=p.data_ptr())

    def edited(self, unseen=False):
        """Others wrote weights; nothing else may have moved. unseen: by the version counter."""
        for key, p in self.params():
            book, now = self.books[key], p.detach().clone()
            if now.shape == book.planes["param"].shape and (codes(now) != codes(book.planes["param"])).any():
                book.unseen = unseen
            book.planes["param"] = now

    @contextmanager
    def refused(self, what):
        """The body raises an error that says who or what, and changes nothing."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            text = str(error)
            named = r"param|state_dict|averaged|(backend|lr|betas|eps|weight_decay|seed|step):"
            assert re.search(named, text), f"{what}: the error names nobody: {text}"
            return
        raise AssertionError(f"{what}: was not refused")

    # ---- steps

    def gradient(self, p):
        kinds = ["normal"] * 6 + ["none", "zero", "float32", "float32", "huge", "tiny", "mixed", "turned", "nan"]
        kind, exponent = self.rng.choice(kinds), self.rng.choice([0, 0, -1, -3])
        if kind == "none":
            return None
        if kind in ("huge", "tiny"):
            exponent = self.rng.choice([10, 18, 25, 37] if kind == "huge" else [-8, -20, -38])
        x = self.normal(p.shape, 0.0 if kind == "zero" else 10.0**exponent)
        if kind == "mixed":
            x = x * 10.0 ** torch.randint(-30, 10, p.shape, generator=self.g)
        if kind == "nan":
            x[torch.rand(p.shape, generator=self.g) < 0.05] = self.rng.choice([float("nan"), float("inf")])
        x = x if kind in ("float32", "mixed") else x.to(p.dtype)
        return x.t().contiguous().t() if kind == "turned" and x.dim() == 2 else x

    def give(self, p, grad):
        p.grad = None
        p.grad_dtype = None if grad is None else grad.dtype
        p.grad = grad

    def step(self):
        for _, p in self.params():
            self.give(p, self.gradient(p))
        stepping = {key: p for key, p in self.params() if p.grad is not None}
        new = self.mon is not None and not self.stepped.isdisjoint(stepping)  # a step of the optimizer may be several
        due = self.mon is not None and (self.calls + new) % self.every == 0
        twin = self.twin() if self.rng.random() < 0.3 and not any(b.unseen for b in self.books.values()) else None
        self.trail(f"    gradients of {', '.join(stepping) or 'nobody'}{', measured' if due else ''}")
        closure = None
        if self.rng.random() < 0.05:  # one that edits, as a line search does
            key, p = self.pick()
            twin = None

            def closure():
                self.trail(f"    and a closure that fills {key}")
                EDITS["fill"](self, p.detach())
                self.edited()

        address = {key: p.data_ptr() for key, p in stepping.items()}
        self.opt.step(closure)
        if self.mon is not None:
            self.calls, self.stepped = self.calls + new, (set() if new else self.stepped) | set(stepping)
        self.steps += 1
        for key, p in stepping.items():
            book, h = self.books[key], hyper(self.group_of(p))
            book.unseen &= address[key] == book.address
            sums = self.sums.setdefault(self.label(key), Sums()) if due else None
            judge(key, self.strategy_of(p), book, self.planes(p), p.grad, h, due, sums)
            self.wrote(key, book.step + 1)
        if twin:
            twin[1].step()
            other = dict(twin[0].named_parameters())
            for key, p in self.params():
                state = {"param": other[key].detach(), **(twin[1].state.get(other[key]) or {})}
                for k, want in {"param": p.detach(), **(self.opt.state.get(p) or {})}.items():
                    assert_same_bits(f"a copy on {twin[1].backend}: '{key}'.{k}", state[k], want)
        if due:
            report = self.mon.report().by_parameter
            for name, sums in self.sums.items():
                sums.compare(name, report[name])

    def twin(self):
        """The same run on the other backend, without a monitor."""
        model, opt = copy.deepcopy((self.model, self.opt))
        opt.monitors.clear()
        opt.backend = {"auto": "reference", "reference": "auto"}[opt.backend]
        for (_, p), q in zip(self.params(), model.parameters(), strict=True):
            self.give(q, None if p.grad is None else p.grad.clone())
        return model, opt


def hyper(group):
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return Hyper(*map(float, numbers), maximize=group["maximize"])


def settings(rng):
    return {
        "lr": rng.choice([1e-3, 1e-5, 1e-1, 0.0, torch.tensor(1e-3), 3.0]),
        "betas": rng.choice([(0.9, 0.999), (0.9, 0.95), (0.0, 0.0), (0.5, 0.9999)]),
        "eps": rng.choice([1e-8, 1e-6, 1e-3]),
        "weight_decay": rng.choice([0.0, 0.01, 0.1, 1.0]),
        "maximize": rng.random() < 0.2,
    }


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
