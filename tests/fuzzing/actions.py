"""What a training loop does besides stepping, and the table of all that the fuzzer does."""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from helpers import assert_same_bits
from oracle import codes
from torch import nn

import collage
from fuzzing.edits import edit, edit_unseen, move
from fuzzing.expected import Book, choices, derived, require, stored, ulp, value
from fuzzing.world import World, settings, through_a_file
from fuzzing.wrong import wrong_load, wrong_step

# ---- saving, copying, exporting


def save(w):
    names = [w.keys_of(group) for group in w.opt.param_groups]
    strategies = {key: str(w.strategy_of(p)) for key, p in w.params()}
    files = through_a_file(w.opt.state_dict()), through_a_file(w.model.state_dict())
    w.saved = (*files, copy.deepcopy(w.books), names, strategies)


def rebuild(w, permute):
    """A new model and optimizer of the same names, shapes and strategies, and other numbers."""
    model, groups = nn.Module(), []
    for key, p in w.params():
        model.register_parameter(key, nn.Parameter(torch.ones(p.shape, dtype=p.dtype)))
    for group in w.opt.param_groups:
        own = [(key, model.get_parameter(key)) for key in w.keys_of(group)]
        order = sorted(own, key=lambda _: w.rng.random()) if permute else own
        groups.append({"params": order if w.named else [p for _, p in order], "strategy": group["strategy"]})
    if permute:
        w.rng.shuffle(groups)
    return model, collage.AdamW(groups, lr=0.5, backend=w.opt.backend)


def adopt(w, model, opt):
    w.model, w.opt, w.mon, w.calls, w.ema = model, opt, None, None, None


def resume(w):
    """Save, and go on in a new process: the optimizer loaded before the model, or after it."""
    save(w)
    state, weights, books, *_ = w.saved
    permute, first = w.named and w.rng.random() < 0.5, w.rng.random() < 0.5
    w.trail(f"    {'permuted, ' if permute else ''}{'optimizer' if first else 'model'} first")
    had = {k: (g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in w.opt.param_groups for k in w.keys_of(g)}
    model, opt = rebuild(w, permute)
    for part in ("opt", "model") if first else ("model", "opt"):
        opt.load_state_dict(state) if part == "opt" else model.load_state_dict(weights)
    adopt(w, model, opt)
    w.books = copy.deepcopy(books)
    for book in w.books.values():
        book.unseen = False
    for group in opt.param_groups:
        for k in w.keys_of(group):
            assert had[k] == (group["lr"], group["betas"], group["eps"], group["weight_decay"]), f"settings of '{k}'"


def roll_back(w):
    """Load an earlier state of the optimizer alone: the weights stay, as edited ones."""
    if w.saved is None:
        return
    state, _, books, names, then = w.saved
    now = [w.keys_of(group) for group in w.opt.param_groups]
    if w.named:
        now, names = ({tuple(sorted(group)) for group in groups} for groups in (now, names))  # in any order
    elif now != names and list(map(len, now)) == list(map(len, names)):
        return  # by position: whatever fits
    if now != names or then != {key: str(w.strategy_of(p)) for key, p in w.params()}:
        with w.refused("a state of other parameters"):
            w.opt.load_state_dict(copy.deepcopy(state))
        return
    w.opt.load_state_dict(copy.deepcopy(state))
    for key, p in w.params():
        book, weights = copy.deepcopy(books[key]), p.detach().clone()
        left = book.left if len(book.planes) > 1 else weights
        w.books[key] = Book({**book.planes, "param": weights}, left, book.step)


def from_torch(w):
    """The moments of torch's AdamW; what theta's other planes hold of the weights stays."""
    twin = copy.deepcopy(w.model).float()
    keys = [w.keys_of(group) for group in w.opt.param_groups]
    theirs = torch.optim.AdamW([{"params": [twin.get_parameter(k) for k in own]} for own in keys], lr=1e-4)
    for p in twin.parameters():
        p.grad = w.normal(p.shape)
    theirs.step()
    w.opt.load_state_dict(theirs.state_dict())
    for key, p in w.params():
        now, book = w.planes(p), w.books[key]
        for k in ("exp_avg", "exp_avg_sq"):
            want = theirs.state[twin.get_parameter(key)][k].double()
            require(key, k, value(k, now), want, stored(w.strategy_of(p), k, now), want.isfinite())
        theta = derived(now) | {k: x for k, x in book.planes.items() if k.startswith("param")}
        w.books[key] = Book(now | theta, book.left if len(book.planes) > 1 else theta["param"], 1, book.unseen)


def clear(w):
    """ReLoRA starts the optimizer anew."""
    w.opt.state.clear()
    for key, p in w.params():
        w.books[key] = Book({"param": p.detach().clone()}, p.detach().clone())


def reset_moments(w):
    w.opt.reset_moments()
    for book in w.books.values():
        book.step = 0
        book.planes |= {k: torch.zeros_like(x) for k, x in book.planes.items() if not k.startswith("param")}


def deepcopy(w):
    adopt(w, *copy.deepcopy((w.model, w.opt)))


def pickled(w):
    adopt(w, *pickle.loads(pickle.dumps((w.model, w.opt))))


def export(w):
    full = collage.high_precision_state_dict(w.model, w.opt)
    for key, book in w.books.items():
        kept, fresh = value("param", book.planes), value("param", derived(book.planes))
        keep, drop = choices(book, looked=True)
        near = (full[key].double() - kept).abs() <= 2.0**-24 * kept.abs() + 2.0**-149  # the sum rounds once
        want = torch.where(keep & (near | ~drop), kept, fresh)
        require(key, "exported value", full[key].double(), want, 2.0**-24 * want.abs() + 2.0**-149, want.abs() < 1e38)


def load_full(w):
    full = {k: w.normal(p.shape, 10.0 ** w.rng.choice([0, -2])) for k, p in w.params()}
    collage.load_high_precision_state_dict(w.model, w.opt, full)
    for key, p in w.params():
        now, want, book = w.planes(p), full[key].double(), w.books[key]
        off = stored(w.strategy_of(p), "param", now)
        require(key, "imported value", value("param", now), want, off, want.isfinite())
        for k in now.keys() & book.planes.keys() - derived(now).keys():
            assert_same_bits(f"'{key}'.{k}", now[k], book.planes[k])
        w.wrote(key)


# ---- settings, groups, watchers


def change_settings(w):
    w.rng.choice(w.opt.param_groups).update(settings(w.rng))


def more_random(w):
    """collage-plus and collage-plus-sr keep the same planes."""
    for group in w.opt.param_groups:
        twin = {"collage-plus": "collage-plus-sr", "collage-plus-sr": "collage-plus", "bf16": "stochastic"}
        group["strategy"] = twin.get(group["strategy"], group["strategy"])


def add_group(w):
    if len(w.opt.param_groups) < 4:
        group = w.new_group()
        with w.casting():
            w.opt.add_param_group(group)
        w.ema = None


def drop_group(w):
    if len(w.opt.param_groups) > 1:
        group = w.opt.param_groups.pop(w.rng.randrange(len(w.opt.param_groups)))
        for key in w.keys_of(group):
            w.opt.state.pop(w.model.get_parameter(key), None)
            delattr(w.model, key)
            del w.books[key]
        w.ema = None
        watch_not(w)


def watch(w):
    if w.mon is None:
        w.calls, w.stepped, w.every, w.sums = 0, set(), w.rng.choice([1, 1, 2, 3]), {}
        w.mon = collage.monitor(
            w.opt, every=w.every, shadow=w.rng.choice([None, 1, 4, 256]), strategies=w.rng.choice([(), "bf16"])
        )


def watch_not(w):
    w.opt.monitors.clear()
    w.mon = w.calls = None


def resync(w):
    w.opt.resync()
    for key, p in w.params():
        if len(w.books[key].planes) > 1:
            fresh = derived(w.books[key].planes)
            for k, want in fresh.items():
                assert_same_bits(f"resync: '{key}'.{k}", w.planes(p)[k], want)
            w.wrote(key)


def average(w):
    """An EMA: made, moved, or swapped in and out."""
    if w.ema is None:
        follow = {"optimizer": w.opt} if "optimizer" in inspect.signature(collage.EMA).parameters else {}
        decay, name = w.rng.choice([0.9, 0.999]), w.rng.choice(["bf16x2:sr", "bf16x2", "fp32"])
        full = collage.high_precision_state_dict(w.model, w.opt)
        finite = [full[key][full[key].isfinite()] for key, p in w.params() if p.requires_grad]
        if name != "fp32" and any(bool(x.to(torch.bfloat16).isinf().any()) for x in finite):
            with w.refused("an average of a weight beyond bfloat16"):  # a remainder took it there
                collage.EMA(w.model, decay, name, **follow)
            return
        w.ema = collage.EMA(w.model, decay, name, **follow)
    if w.rng.random() < 0.5:
        old = {key: w.ema.value(key).double() for key in w.books}
        w.ema.update()
        for key, book in w.books.items():
            theta = value("param", book.planes if hasattr(w.ema, "optimizer") else derived(book.planes))
            want = w.ema.decay * old[key] + (1 - w.ema.decay) * theta
            off = 2.0**-16 * want.abs() + 2.0**-20 * (old[key].abs() + theta.abs()) + 2.0**-132
            ok = (
                (theta.abs() < 1e38)
                & (old[key].abs() < 1e38)
                & (codes(book.left.contiguous()) == codes(book.planes["param"].contiguous()))
            )
            require(key, "average", w.ema.value(key).double(), want, off, ok)
        return
    with w.ema.averaged():
        for key, p in w.params():
            want = w.ema.value(key).double()
            require(key, "lent average", p.detach().double(), want, ulp(want, p.dtype) / 2, want.abs() < 1e38)
        full = collage.high_precision_state_dict(w.model, w.opt)
        for key in w.books:
            want = w.ema.value(key).double()
            require(key, "exported average", full[key].double(), want, 0 * want, want.isfinite())
        for _, p in w.params():
            w.give(p, torch.ones_like(p))
        if w.rng.random() < 0.5:
            with w.refused("a step inside averaged()"):
                w.opt.step()
        else:
            with w.refused("resync() inside averaged()"):
                w.opt.resync()


ACTIONS = {  # action: how often
    World.step: 40, edit: 20, edit_unseen: 6, move: 5, save: 3, resume: 5, roll_back: 4, from_torch: 2, clear: 1,
    reset_moments: 1, deepcopy: 3, pickled: 3, export: 4, load_full: 2, change_settings: 5, more_random: 1,
    add_group: 3, drop_group: 2, watch: 6, watch_not: 1, resync: 2, average: 4, wrong_step: 6, wrong_load: 3,
}  # fmt: skip
