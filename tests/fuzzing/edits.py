"""What others do to weights between two steps: they write them, or move them."""

from __future__ import annotations

import torch
from oracle import codes, from_codes
from torch import nn

# ---- edits: others write weights


def nudge(w, p):
    """One ulp up or down."""
    up = torch.where(torch.rand(p.shape, generator=w.g) < 0.5, 1, -1)
    p.copy_(from_codes(codes(p.detach().contiguous()) + up, p.dtype).view(p.shape).nan_to_num(1.0))


def swap(w, p, times=1):
    for _ in range(times):  # twice: the allocator may give the first address again
        p.data = w.normal(p.shape).to(p.dtype)


def renorm(w, p):
    if p.dim() == 2 and p.numel():
        nn.functional.embedding(torch.arange(len(p)), p, max_norm=w.rng.choice([0.1, 1.0]))


def load_model(w, _):
    w.model.load_state_dict({k: w.normal(p.shape).to(p.dtype) for k, p in w.params()})


def elsewhere(w, _):
    """A step of another optimizer."""
    for p in w.model.parameters():
        w.give(p, w.normal(p.shape).to(p.dtype))
    torch.optim.SGD(w.model.parameters(), lr=w.rng.choice([1e-4, 0.1])).step()


def vector(w, _):
    params = [p for p in w.model.parameters() if p.dtype == next(w.model.parameters()).dtype]
    nn.utils.vector_to_parameters(w.normal(sum(p.numel() for p in params)).to(params[0].dtype), params)


EDITS = {
    "fill": lambda w, p: p.fill_(
        w.rng.choice([5.0, 1.0, 0.0, -0.0, 1e-3, torch.finfo(p.dtype).max / 64, float("inf")])
    ),
    "mul": lambda w, p: p.mul_(w.rng.choice([0.5, 0.999, 2.0, -1.0, 1.1])),
    "clamp": lambda w, p: p.clamp_(-0.5, 0.5),
    "copy": lambda w, p: p.copy_(w.normal(p.shape)),
    "copy of itself": lambda _, p: p.copy_(p.clone()),
    "add": lambda w, p: p.add_(w.normal(p.shape, 10.0 ** w.rng.choice([-1, -3])).to(p.dtype)),
    "prune": lambda w, p: p.masked_fill_(torch.rand(p.shape, generator=w.g) < 0.3, 0.0),
    "nudge": nudge,
    "p.set_": lambda w, p: p.set_(w.normal(p.shape).to(p.dtype)),
    "embedding renorm": renorm,
    "load the model": load_model,
    "torch's SGD": elsewhere,
    "foreach": lambda w, _: torch._foreach_mul_(list(w.model.parameters()), 0.7),
    "detached alias": lambda _, p: p.detach().mul_(0.3),
}
# Not seen by the version counter. By the address, unless the allocator gives the old one again.
UNSEEN = {
    "p.data =": swap,
    "p.data = twice": lambda w, p: swap(w, p, 2),
    "vector_to_parameters": vector,
    "p.data.mul_": lambda _, p: p.data.mul_(0.3),
    "p.data.fill_": lambda _, p: p.data.fill_(2.0),
    "p.data.copy_": lambda w, p: p.data.copy_(w.normal(p.shape)),
}
# ---- moves: the same numbers elsewhere
MOVES = {
    "p.data = clone": lambda _, p: setattr(p, "data", p.data.clone(memory_format=torch.contiguous_format)),
    "p.set_(clone)": lambda _, p: p.set_(p.detach().clone()),
    "turned": lambda _, p: setattr(p, "data", p.data.t().contiguous().t() if p.dim() == 2 else p.data),
    "freed and back": lambda w, p: free(w, p),
    "state cloned": lambda w, p: w.opt.state[p].update({k: v.clone() for k, v in w.opt.state[p].items()}),
}


def free(_, p):
    kept, memory = p.detach().clone(), p.untyped_storage()
    if p.numel() and p.storage_offset() == 0 and memory.nbytes() == p.nbytes:
        memory.resize_(0)
        memory.resize_(p.nbytes)
        p.data.copy_(kept)


def edit(w, table=EDITS, unseen=False):
    how = w.rng.choice(list(table))
    key, p = w.pick()
    w.trail(f"    {how} {key}")
    with torch.no_grad():
        table[how](w, p)
    w.edited(unseen)


def edit_unseen(w):
    edit(w, UNSEEN, unseen=True)


def move(w):
    how = w.rng.choice(list(MOVES))
    key, p = w.pick()
    w.trail(f"    {how} {key}")
    with torch.no_grad():
        MOVES[how](w, p)
