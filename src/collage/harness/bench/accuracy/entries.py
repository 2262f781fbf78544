"""The lines of the tables: every format of ours in a role, and what other packages keep in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from collage.formats import FORMATS, format_of
from collage.harness.bench.accuracy import peers
from collage.harness.bench.accuracy.held import Held, Stepped
from collage.layout import bytes_per_value
from collage.rules import RULES
from collage.strategies import STRATEGIES, Strategy

INSTALL = "pip install '.[bench]'"
MOMENTS = ("momentum", "variance")


class Entry(NamedTuple):
    """One line.

    Args:
        names: of what it keeps, by role; of another package's, the package.
        sizes: bytes per parameter of each.
        make: (theta, lr) for weights alone, (theta, lr, AdamW's settings) with moments.
        package: that it needs.
    """

    names: tuple[str, ...]
    sizes: tuple[float, ...]
    make: Callable[..., Held]
    package: str = ""

    @property
    def name(self) -> str:
        return " + ".join(dict.fromkeys(self.names))

    @property
    def size(self) -> float:
        return sum(self.sizes)

    @property
    def ours(self) -> bool:
        return all(name in FORMATS for name in self.names)

    def missing(self) -> str:
        """Why it cannot be measured here; "" if it can."""
        if not self.package:
            return ""
        try:
            import_module(self.package)
            settings = ((0.9, 0.999, 1e-8, 0.0),) if len(self.names) > 1 else ()
            self.make(torch.zeros(16, 256), 1e-3, *settings).step(torch.ones(16, 256))
        except Exception as error:  # theirs: say so in its row, go on with the others
            absent = isinstance(error, ImportError) and error.name == self.package.partition(".")[0]
            return f"not installed: {INSTALL}" if absent else f"fails: {type(error).__name__}: {error}"[:120]
        return ""


def weights(strategies: Sequence[Strategy], others: bool) -> list[Entry]:
    """Formats of weights: those of the strategies, or all there are, by bytes; then other packages'."""
    names = dict.fromkeys(s.param for s in strategies) or [
        n for n, f in FORMATS.items() if f.dtypes[0].is_floating_point
    ]
    found = sorted((_weight(name) for name in names), key=lambda entry: entry.size)
    return [*found, *(WEIGHTS if others else ())]


def _weight(name: str) -> Entry:
    def make(theta: Tensor, lr: float) -> Held:
        return Stepped(RULES["apply"], (name,), theta, lr, (0.0,))

    return Entry((name,), (bytes_per_value(format_of(name)),), make)


def moments(strategies: Sequence[Strategy], others: bool) -> list[Entry]:
    """Pairs of formats for (m, v), float32's among them: the strategies', or all; then other packages'."""
    chosen = [STRATEGIES["fp32"], *(strategies or STRATEGIES.values())]
    pairs = [strategy.formats(MOMENTS) for strategy in chosen]
    pairs += () if strategies else _others(pairs)
    found = sorted((_pair(*pair) for pair in dict.fromkeys(pairs)), key=lambda entry: entry.size)
    return [*found, *(PACKAGES if others else ())]


def _others(pairs: Sequence[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
    """Pairs of the formats that no strategy has in a role: one for both if it can be, else side by side."""
    takes = [[name for name in FORMATS if _takes(role, name)] for role in MOMENTS]
    left = [[name for name in own if name not in {pair[k] for pair in pairs}] for k, own in enumerate(takes)]
    both = [name for name in FORMATS if name in (*left[0], *left[1]) and all(name in own for own in takes)]
    alone = [[name for name in own if name not in both] for own in left]
    return [*((name, name) for name in both), *zip_longest(*alone, fillvalue="fp32")]


def _takes(role: str, name: str) -> bool:
    """Whether a strategy takes a format in a role."""
    try:
        Strategy(**{role: name})
    except ValueError:
        return False
    return True


def _pair(m: str, v: str) -> Entry:
    def make(theta: Tensor, lr: float, hyper: Sequence[float]) -> Held:
        return Stepped(RULES["adamw"], ("fp32", m, v), theta, lr, hyper)

    return Entry((m, v), (bytes_per_value(format_of(m)), bytes_per_value(format_of(v))), make)


WEIGHTS = (
    Entry(("FlashOptim (emulated)",), (3,), peers.flash_weights),
    Entry(("optimi (Kahan)",), (4,), peers.optimi_weights, "optimi"),
)
PACKAGES = (
    Entry(("FlashOptim (emulated)",) * 2, (1 + 2 / peers.GROUP,) * 2, peers.flash),
    Entry(("torchao AdamW8bit",) * 2, (1 + 4 / 256,) * 2, peers.torchao, "torchao.optim"),
    Entry(("optimi AdamW",) * 2, (2, 2), peers.optimi, "optimi"),
)
