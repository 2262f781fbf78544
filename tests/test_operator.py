"""The operator that every step goes through: its schema, its fake, and compiled steps with eager's bits."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import collage
from collage.strategies import STRATEGIES


def arguments(measured: bool) -> tuple:
    g = torch.Generator().manual_seed(0)
    shapes = [(40,), (3, 5)]
    planes = [torch.randn(s, generator=g).bfloat16() * scale for s in shapes for scale in (1, 0, 1e-3, 1e-3, 0)]
    planes = [p.abs() if k % 5 > 2 else p for k, p in enumerate(planes)]
    grads = [torch.randn(s, generator=g).bfloat16() for s in shapes]
    steps = [torch.tensor(3), torch.tensor(0)]
    sums = torch.zeros(2 if measured else 0, 5, dtype=torch.float64)
    return (
        planes, grads, steps, sums, torch.tensor(1e-3), torch.tensor([0.9, 0.999, 1e-8, 0.1], dtype=torch.float64),
        "adamw", "collage-plus-sr", "auto", [1, -2], [], 7, False, False,
    )  # fmt: skip


@pytest.mark.parametrize("measured", [False, True])
def test_opcheck(measured):
    torch.library.opcheck(torch.ops.collage.step_.default, arguments(measured))


def model(strategy: str) -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    dtype = STRATEGIES[strategy].dtype
    shapes = {"a": (300,), "b": (7, 5), "empty": (0,), "scalar": ()}
    params = {name: nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for name, shape in shapes.items()}
    params["full"] = nn.Parameter(torch.randn(64, generator=g))
    return list(params.items())


def decay_lr(group, _):
    group["lr"].mul_(0.9)


def one_cycle(group, t):
    """What OneCycleLR moves, and a decay on a schedule of its own."""
    group["lr"], group["betas"] = 1e-3 / (t + 2), (0.95 - 0.005 * t, 0.999)
    group["weight_decay"] = 0.1 / (t + 2)


def train(strategy: str, compiled: bool, steps: int = 20, lr=1e-3, schedule=one_cycle, edit=None):
    """(parameters, optimizer, compilations) after some steps on a schedule."""
    params = model(strategy)
    opt = collage.AdamW(params, lr=lr, strategy=strategy, seed=2**63 + 5)
    graphs = []

    def count(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, inputs)

    step = torch.compile(opt.step, fullgraph=True, backend=count) if compiled else opt.step
    g = torch.Generator().manual_seed(1)
    for t in range(steps):
        for _, p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        step()
        schedule(opt.param_groups[0], t)
        if edit:
            edit(params, t)
    return params, opt, len(graphs)


def assert_same_runs(mine, theirs):
    for (name, p), (_, q) in zip(mine[0], theirs[0], strict=True):
        assert_same_bits(name, q.detach(), p.detach())
        for key, value in mine[1].state[p].items():
            assert_same_bits(f"{name}.{key}", theirs[1].state[q][key], value)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("strategy", ["collage-plus", "collage-plus-sr", "fp32-master", "paper-plus"])
@pytest.mark.parametrize("schedule", [decay_lr, one_cycle])
def test_a_compiled_step_has_eagers_bits_and_compiles_once_or_twice(strategy, schedule):
    """Whatever a schedule moves: lr as a tensor or a float, betas, decay."""
    torch._dynamo.reset()
    lr = torch.tensor(1e-3) if schedule is decay_lr else 1e-3
    eager, compiled = (
        train(strategy, compiled, lr=lr if schedule is one_cycle else lr.clone(), schedule=schedule)
        for compiled in (False, True)
    )
    assert 1 <= compiled[2] <= 2
    assert_same_runs(eager, compiled)
    assert int(compiled[1].state[compiled[0][0][1]]["step"]) == 20


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("strategy", ["collage-plus", "fp32"])
def test_a_compiled_step_refuses_other_dtypes_and_sizes_than_it_was_compiled_for(strategy):
    """torch looks at sizes (an AssertionError of its own) and not at dtypes, and kernels read raw memory."""
    dtype = STRATEGIES[strategy].dtype
    p = nn.Parameter(torch.ones(64, 64).to(dtype))
    opt = collage.AdamW([("w", p)], strategy=strategy)
    torch._dynamo.reset()
    step = torch.compile(opt.step)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        step()
    others = (p.data.bfloat16() if dtype == torch.float32 else p.data.float(), p.data[:, :7].clone(), p.data[:8])
    for other in others:
        kept, p.grad = p.data, None
        p.data = other
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        cast = other.dtype != dtype
        with pytest.raises(ValueError if cast else AssertionError, match=r"param 'w': .* cast" if cast else "size"):
            step()
        assert_same_bits("w", p.detach(), before)
        p.grad, p.data = None, kept
    p.grad = torch.ones_like(p)
    step()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:changed outside the optimizer")
def test_a_compiled_step_sees_another_address():
    """Pruning and vector_to_parameters write `p.data = ...`, which moves no version."""
    results = []
    for compiled in (False, True):
        w = nn.Parameter(torch.full((4,), 1.001))
        opt = collage.AdamW([("w", w)], lr=1e-9, cast=True)
        torch._dynamo.reset()
        step = torch.compile(opt.step) if compiled else opt.step
        for t in range(6):
            w.grad = torch.ones_like(w)
            if t in (2, 4):
                kept = w.data  # so that the address is another
                w.data = torch.full_like(w.data, 1e-6)
            step()
        results.append(w.detach())
        del kept
    assert_same_bits("w", *results)
    assert (results[0] < 1e-5).all()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:changed outside the optimizer")
def test_a_compiled_step_sees_edits_and_looks_at_nothing_else(monkeypatch):
    """It counts versions up before it runs, and learns by how much."""
    from collage.optimizers import edits

    def edit(params, t):
        if t in (3, 7):
            with torch.no_grad():
                params[t % 2][1].mul_(2.0**-10)

    looked = []
    misfits = edits._misfits
    monkeypatch.setattr(edits, "_misfits", lambda *a: looked.append(list(a[3])) or misfits(*a))
    torch._dynamo.reset()
    eager = train("collage-plus", compiled=False, steps=10, edit=edit)
    expected = looked.copy()
    looked.clear()
    assert_same_runs(eager, train("collage-plus", compiled=True, steps=10, edit=edit))
    assert looked == expected == [[0, 1, 2, 3], [0], [1], [1]]  # all when they are new, then the edited one


def test_views_of_one_buffer_are_refused_when_compiled_and_right_when_not():
    buffer = torch.ones(64).bfloat16()
    params = [("a", nn.Parameter(buffer[:32])), ("b", nn.Parameter(buffer[32:]))]
    opt = collage.AdamW(params, lr=0.1, weight_decay=0.0)
    for (_, p), sign in zip(params, (1, -1), strict=True):
        p.grad = torch.full_like(p, sign)
    opt.step()
    assert (buffer[:32] < 1).all()
    assert (buffer[32:] > 1).all()
    before = buffer.clone()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="views of one buffer"):
        torch.compile(opt.step, fullgraph=True, backend="eager")()
    assert_same_bits("buffer", buffer, before)


def test_a_monitored_step_does_not_compile_silently():
    params = model("collage-plus")
    opt = collage.AdamW(params)
    collage.monitor(opt)
    for _, p in params:
        p.grad = torch.zeros_like(p)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="monitor: it measures in Python"):
        torch.compile(opt.step, fullgraph=True, backend="eager")()


def test_a_refusal_inside_a_compiled_step_stands_in_the_first_line():
    """torch wraps what an optimizer raises while it is traced; what to do must not be looked for."""
    p = nn.Parameter(torch.ones(8).bfloat16())
    opt = collage.AdamW([("w", p)])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["exp_avg"] = torch.zeros(8)
    for fullgraph in (True, False):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="exp_avg") as refused:
            torch.compile(opt.step, fullgraph=fullgraph, backend="eager")()
        assert "ValueError: param 'w': strategy 'collage-plus' keeps" in str(refused.value).splitlines()[0]


def test_without_kernels_auto_warns_once_and_steps_on_the_reference(monkeypatch):
    from collage import saying
    from collage.backends import cpu

    p = nn.Parameter(torch.ones(8).bfloat16())
    monkeypatch.setattr(cpu, "native", None)
    saying.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference backend.*compiler"):
        opt = collage.AdamW([p], lr=0.1)
    collage.AdamW([p])  # no second warning: here it would be an error
    p.grad = torch.ones_like(p)
    opt.step()
    assert (p < 1).all()
    collage.AdamW([p], backend="reference")
    with pytest.raises(RuntimeError, match="'cpu' is not available"):
        collage.AdamW([p], backend="cpu")


def test_a_strategy_or_dtype_changed_later_is_named():
    p = nn.Parameter(torch.ones(8).bfloat16())
    opt = collage.AdamW([("w", p)])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["strategy"] = "collage-light"
    with pytest.raises(ValueError, match="param 'w': strategy 'collage-light' keeps"):
        opt.step()
    opt.param_groups[0]["strategy"] = "collage-plus"
    p.data, p.grad = p.data.float(), None
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"all 1 trainable parameters are float32.*cast after the optimizer was made"):
        opt.step()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "plane",
    [
        torch.zeros(8),
        torch.zeros(7).bfloat16(),
        None,
        torch.zeros(8, dtype=torch.bfloat16, device="meta"),
        torch.zeros(1).bfloat16().expand(8),
        torch.zeros(2, 4).bfloat16().t(),
        "freed",
    ],
)
def test_a_plane_replaced_by_another_is_refused_before_anything_changed(plane, backend):
    """Kernels read raw memory: a plane of another dtype, size or device must never reach them."""
    first, p = (nn.Parameter(torch.ones(8).bfloat16()) for _ in range(2))
    opt = collage.AdamW([("first", first), ("w", p)], lr=0.1, backend=backend)
    first.grad, p.grad = torch.ones_like(first), torch.ones_like(p)
    opt.step()
    if isinstance(plane, str):
        opt.state[p]["exp_avg"].untyped_storage().resize_(0)
    else:
        opt.state[p]["exp_avg"] = plane
    before = [first.detach().clone(), p.detach().clone()]
    with pytest.raises(ValueError, match="param 'w': "):
        opt.step()
    assert_same_bits("first", first.detach(), before[0])
    assert_same_bits("w", p.detach(), before[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_given_another_size_are_named(backend):
    """An embedding that was resized after steps: its state, and a gradient from before, have the old size."""
    p = nn.Parameter(torch.ones(8, 4).bfloat16())
    opt = collage.AdamW([("w", p)], backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    p.data = torch.ones(6, 4).bfloat16()
    with pytest.raises(ValueError, match=r"param 'w': its gradient has shape \(8, 4\).*zero_grad"):
        opt.step()
    p.grad = None
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"param 'w': param_lo has shape \(8, 4\), not the parameter's \(6, 4\)"):
        opt.step()


def test_what_cannot_be_counted_is_not_updated():
    p = nn.Parameter(torch.ones(8).bfloat16())
    opt = collage.AdamW([p], lr=0.1)
    p.grad = torch.ones_like(p)
    opt.step()
    before = p.detach().clone()
    opt.state[p]["step"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="param '0': step needs to be a 0-d int64 tensor"):
        opt.step()
    assert_same_bits("p", p.detach(), before)


@pytest.mark.parametrize("step", [torch.tensor(1.0), torch.tensor([1])])
def test_the_operator_itself_counts_nothing_else(step):
    """It adds at raw addresses: whoever calls it directly is refused too, before anything is written."""
    given = list(arguments(measured=False))
    before = [p.clone() for p in given[0]]
    given[2] = [torch.tensor(3), step]
    with pytest.raises(ValueError, match="step: needs a 0-d int64 tensor"):
        torch.ops.collage.step_(*given)
    assert int(given[2][0]) == 3
    for plane, (now, then) in enumerate(zip(given[0], before, strict=True)):
        assert_same_bits(f"plane {plane}", now, then)


def test_a_group_has_no_backend_of_its_own():
    with pytest.raises(ValueError, match="backend: one for the whole optimizer"):
        collage.AdamW([{"params": [nn.Parameter(torch.ones(8).bfloat16())], "backend": "reference"}])
