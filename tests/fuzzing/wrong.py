"""Steps and loads that cannot be right: each is refused, says who or what, and changes nothing."""

from __future__ import annotations

import torch

from fuzzing.edits import edit
from fuzzing.world import through_a_file

F32, BF16 = torch.float32, torch.bfloat16

# ---- what must be refused, and change nothing


def recast(w, params, dtypes):
    kept = [(p, p.data) for p in params]
    for p, data in kept:
        p.grad = None
        p.data = data.to(w.rng.choice([d for d in dtypes if d != data.dtype]))
        w.give(p, torch.ones_like(p))
    return lambda: [setattr(p, "data", data) for p, data in kept]


def cast(w, p):
    """Not between bfloat16 and float32 where the state suits both: a mixed model may have such parameters."""
    both = () if w.group_of(p)["strategy"] == "fp32-states" else (F32, BF16)
    return recast(w, [p], (torch.float16, torch.float64, *both))


def cast_all(w, _):
    """model.float() late: not float32 training in silence. With a group of strategy fp32 the model is a mixed one."""
    full = [p for p in w.model.parameters() if w.group_of(p)["strategy"] == "fp32"]
    suits = ("fp32", "fp32-states") if full else ()
    low = [p for p in w.model.parameters() if p.dtype != F32 and w.group_of(p)["strategy"] not in suits]
    low = [p for p in low if w.opt.state.get(p)] if full else low
    return recast(w, low, (F32,)) if low else recast(w, full, (BF16,))


def grown(w, p):
    kept = p.data
    p.grad = None
    p.data = torch.cat([p.data.flatten(), p.data.new_ones(3)])
    w.give(p, torch.ones_like(p))
    return lambda: setattr(p, "data", kept)


def freed(w, p):
    kept = p.data
    p.data = kept.clone()
    p.untyped_storage().resize_(0)
    return lambda: setattr(p, "data", kept)


def wrong_setting(w, p):
    group = w.group_of(p)
    key, bad = w.rng.choice([("lr", float("nan")), ("lr", -1.0), ("betas", (1.0, 0.9)), ("seed", -1), ("eps", -1.0)])
    kept = group[key]
    group[key] = bad
    return lambda: group.update({key: kept})


def wrong_state(w, p):
    state = w.opt.state[p]
    key = w.rng.choice(list(state))
    kept = state[key]
    wrong = [lambda: state.pop(key), lambda: state.update({key: 3})]
    if key != "step":
        wrong += [lambda: state.update({key: kept.double()}), lambda: state.update({key: kept.flatten()[1:]})]
    w.rng.choice(wrong)()
    return lambda: (state.pop(key, None), state.update({key: kept}))


def wrong_backend(w, _):
    """Found only after the step has looked at everything else."""
    kept = w.opt.backend
    w.opt.backend = "cuda"
    return lambda: setattr(w.opt, "backend", kept)


WRONG = {
    "a backend": wrong_backend,
    "a float64 gradient": lambda w, p: w.give(p, torch.ones_like(p).double()),
    "a sparse gradient": lambda w, p: w.give(p, torch.ones_like(p).to_sparse()),
    "another dtype": cast,
    "another dtype of all": cast_all,
    "another shape": grown,
    "freed weights": freed,
    "a setting": wrong_setting,
    "a state": wrong_state,
}


def wrong_step(w):
    key, p = w.pick(lambda key, p: w.books[key].step and p.numel() > 1 and p.dim())
    if key is None:
        return
    what = w.rng.choice(list(WRONG))
    w.trail(f"    {what}: {key}")
    for _, q in w.params():
        w.give(q, torch.ones_like(q))
    mend = WRONG[what](w, p)
    try:
        with w.refused(what):
            w.opt.step()
    finally:
        if mend:
            mend()
    w.check()
    if w.rng.random() < 0.5:  # what the refused step noted down must not hide it
        edit(w)


def wrong_load(w):
    """A state_dict that cannot be right."""
    key, p = w.pick(lambda key, p: w.books[key].step and p.numel())
    if key is None:
        return
    bad = through_a_file(w.opt.state_dict())
    order = [q for g in w.opt.param_groups for q in g["params"]]
    at = next(i for i, q in enumerate(order) if q is p)
    theirs, group = bad["state"][at], bad["param_groups"][0]
    k = w.rng.choice([k for k in theirs if k != "step"])
    how = {
        "without a plane": lambda: theirs.pop(k),
        "another shape": lambda: theirs.update({k: torch.cat([theirs[k].flatten(), theirs[k].flatten()])}),
        "another dtype": lambda: theirs.update({k: theirs[k].double()}),
        "a number": lambda: theirs.update({k: 1.0}),
        "a step of -1": lambda: theirs.update(step=torch.tensor(-1)),
        "another strategy": lambda: group.update(strategy="bf16" if group["strategy"] != "bf16" else "fp32-master"),
        "a group less": lambda: bad["param_groups"].pop(),
        "a parameter less": lambda: (group["params"].pop(), w.named and group["param_names"].pop()),
        "nothing": lambda: bad.clear(),
    }
    if w.named:
        how["another name"] = lambda: group["param_names"].__setitem__(0, "somebody")
        how["a name twice"] = lambda: (
            group["param_names"].__setitem__(0, group["param_names"][-1]) if len(group["params"]) > 1 else bad.clear()
        )
    what = w.rng.choice(list(how))
    w.trail(f"    {what}: {key}.{k}")
    how[what]()
    with w.refused(f"a state with {what}"):
        w.opt.load_state_dict(bad)
