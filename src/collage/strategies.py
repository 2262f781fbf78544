"""The table of precision strategies: a number format for each role, and the arithmetic between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache

import torch

from collage.formats import FORMATS, format_of
from collage.layout import as_rows, bytes_per_value

ARITHMETICS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROLES = ("param", "momentum", "variance")
_PAPER = ("bf16", "bf16x2", "bf16+kahan")  # what bfloat16 arithmetic is written for
SMALL = 4096  # elements: a parameter of fewer, of rows shorter than SHORT, or without rows takes formats' twins
SHORT = 32


def _unfit(role: str, name: str) -> str:
    """Why a format cannot be one of that role, and what to use; "": it can."""
    fmt = FORMATS[name]
    if role == "param":
        if not fmt.dtypes[0].is_floating_point:
            return "has no weight that a forward pass could read; it is one for moments; use 'bf16+int8:sr' or 'bf16x2'"
        return ""
    if "+" in name:  # a visible plane that only a forward pass reads
        return "is a format for param; use 'fp32', 'bf16' or 'bf16x2'"
    if role == "momentum" and name.startswith("uint8"):
        return "has no sign; use 'int8/128:sr'"
    if role == "variance" and name.startswith("int8"):
        return "lets a second moment become 0, and updates explode; use 'uint8/128:sr'"
    return ""


@dataclass(frozen=True, slots=True)
class Strategy:
    """A number format for each role that a rule's slots have, and the arithmetic of its update.

    Args:
        param: format of the weights; its first plane is the parameter itself and sets its dtype.
        momentum: format of first moments: ``exp_avg``, ``momentum_buffer``.
        variance: format of second moments: ``exp_avg_sq``, ``max_exp_avg_sq``.
        arithmetic: "float32" decodes planes into fp32 registers; "bfloat16" rounds every operation to bf16, as in the
            paper's Algorithm 2.

    Raises:
        ValueError: an unknown format or arithmetic, or a combination that has no meaning.

    >>> Strategy(param="bf16x2", variance="bf16x2").bytes_per_param(gradient_bytes=2)
    12
    """

    param: str = "bf16x2"
    momentum: str = "bf16"
    variance: str = "bf16"
    arithmetic: str = "float32"

    def __post_init__(self) -> None:
        if self.arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic: unknown {self.arithmetic!r}; known: {', '.join(ARITHMETICS)}")
        for role in ROLES:
            name = getattr(self, role)
            if name not in FORMATS:
                fit = [other for other in FORMATS if not _unfit(role, other)]
                close = get_close_matches(str(name).strip().lower(), fit, n=1)
                meant = "".join(f"; did you mean {other!r}?" for other in close)
                raise ValueError(f"{role}: unknown format {name!r}; known formats: {', '.join(fit)}{meant}")
            reason = _unfit(role, name)
            if reason:
                raise ValueError(f"{role}: {name!r} {reason}")
            if self.arithmetic == "bfloat16" and name not in _PAPER:
                known = "', '".join(_PAPER)
                raise ValueError(f"{role}: bfloat16 arithmetic takes '{known}', got {name!r}; use arithmetic='float32'")
        if self.param == "bf16+kahan" and self.arithmetic != "bfloat16":
            raise ValueError("param: 'bf16+kahan' is a recurrence in bf16; use arithmetic='bfloat16'")

    def formats(self, roles: Iterable[str] = ROLES) -> tuple[str, ...]:
        """The names of these roles' formats."""
        return tuple(getattr(self, role) for role in roles)

    def of(self, shape: Sequence[int]) -> Strategy:
        """The strategy of a parameter of that unsharded shape: small ones take the 16-bit twins of formats with blocks.

        Small are those of one dimension, of fewer than 4,096 elements, or with rows of fewer than 32.

        >>> str(STRATEGIES["collage-8bit"].of((768,)))
        'param=bf16+int8:sr,momentum=bf16:sr,variance=bf16x2:sr,arithmetic=float32'
        """
        return self.small if is_small(shape) else self

    @property
    def beside(self) -> Strategy:
        """That of the 16-bit parameters of a model whose linear layers have 8-bit ones; of 16-bit strategies itself.

        >>> STRATEGIES["collage-fp8"].beside.param
        'bf16x2:sr'
        """
        return _beside(self)

    def on(self, dtype: torch.dtype) -> Strategy | None:
        """Itself or `beside`, whichever takes parameters of that dtype; None: neither does."""
        return next((known for known in (self, self.beside) if known.dtype == dtype), None)

    @property
    def small(self) -> Strategy:
        """That of small parameters; itself, if no format has a twin."""
        return _twin(self)

    @property
    def exception(self) -> str:
        """What 16-bit and small parameters take instead, in words; "" where it is the same.

        >>> STRATEGIES["collage-8bit"].exception
        'parameters of one dimension, of fewer than 4,096 elements or with rows below 32 keep bf16:sr, bf16x2:sr'
        >>> STRATEGIES["fp8-master"].exception
        'bfloat16 parameters keep bf16+fp32'
        """
        twins = [format_of(name).twin for name in self.formats() if format_of(name).twin]
        small = f"of one dimension, of fewer than {SMALL:,} elements or with rows below {SHORT}"
        beside = "" if self.beside is self else f"bfloat16 parameters keep {self.beside.param}"
        return "; ".join(filter(None, (beside, f"parameters {small} keep {', '.join(twins)}" if twins else "")))

    def excepts(self, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Whether a parameter that it takes is kept as `exception` says."""
        own = self.on(dtype)
        return own is not None and own.of(shape) != self

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameter: plane 0 of ``param``."""
        return format_of(self.param).dtypes[0]

    @property
    def register(self) -> torch.dtype:
        """dtype of a register in this strategy's arithmetic."""
        return ARITHMETICS[self.arithmetic]

    @property
    def stochastic(self) -> bool:
        """Whether any format rounds stochastically."""
        return any(format_of(name).stochastic for name in self.formats())

    def bytes_per_param(self, gradient_bytes: int | None = None, roles: Iterable[str] = ROLES) -> float:
        """Bytes of weights, optimizer state and gradient for one parameter; its gradient as wide as it, 2 at least.

        roles: of the rule's slots; by default Adam's.
        """
        gradient = self.beside.dtype.itemsize if gradient_bytes is None else gradient_bytes
        return gradient + sum(bytes_per_value(format_of(name)) for name in self.formats(roles))

    def __str__(self) -> str:
        """Its name in STRATEGIES, or the canonical spec that `Strategy.parse` reads."""
        spec = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return next((name for name, known in STRATEGIES.items() if known == self), spec)

    @staticmethod
    def parse(strategy: str | Strategy) -> Strategy:
        """A Strategy from itself, a name, a letter of the paper (A, B, C, D, D-MW), or a canonical spec.

        >>> Strategy.parse("param=bf16x2,momentum=fp32,variance=fp32").momentum
        'fp32'
        """
        if isinstance(strategy, Strategy):
            return strategy
        if not isinstance(strategy, str):
            raise TypeError(f"strategy: needs a name or a Strategy, got {type(strategy).__name__}")
        return _parse(strategy)


STRATEGIES: dict[str, Strategy] = {
    "bf16": Strategy("bf16", "bf16", "bf16"),
    "collage-light": Strategy("bf16x2", "bf16", "bf16"),
    "collage-plus": Strategy("bf16x2", "bf16", "bf16x2"),
    "collage-plus-sr": Strategy("bf16x2:sr", "bf16:sr", "bf16x2:sr"),
    "paper-bf16": Strategy("bf16", "bf16", "bf16", "bfloat16"),
    "paper-light": Strategy("bf16x2", "bf16", "bf16", "bfloat16"),
    "paper-plus": Strategy("bf16x2", "bf16", "bf16x2", "bfloat16"),
    "fp32-states": Strategy("bf16", "fp32", "fp32"),
    "fp32-master": Strategy("bf16+fp32", "fp32", "fp32"),
    "fp8-master": Strategy("e4m3+fp32", "fp32", "fp32"),
    "fp32": Strategy("fp32", "fp32", "fp32"),
    "kahan": Strategy("bf16+kahan", "bf16", "bf16", "bfloat16"),
    "stochastic": Strategy("bf16:sr", "bf16:sr", "bf16:sr"),
    "collage-fp16": Strategy("fp16x2", "bf16", "bf16"),
    "collage-exact": Strategy("bf16+int16", "bf16", "bf16x2"),
    "collage-exact-lean": Strategy("bf16+int16", "bf16:sr", "bf16:sr"),
    "collage-8bit-plus": Strategy("bf16x2:sr", "int8/128:sr", "uint8/128:sr"),
    "collage-8bit": Strategy("bf16+int8:sr", "int8/128:sr", "uint8/128:sr"),
    "collage-fp8": Strategy("e4m3+int16", "int8/128:sr", "uint8/128:sr"),
    "collage-fp8-lean": Strategy("e4m3+int8:sr", "int8/128:sr", "uint8/128:sr"),
}


def is_small(shape: Sequence[int]) -> bool:
    """Whether a parameter of that unsharded shape takes formats' twins."""
    rows, columns = as_rows(shape)
    return len(shape) < 2 or rows * columns < SMALL or columns < SHORT


ALIASES = {"A": "paper-bf16", "B": "paper-light", "C": "paper-plus", "D": "fp32-master", "D-MW": "fp32-states"}


@cache
def _twin(strategy: Strategy) -> Strategy:
    twins = {role: format_of(getattr(strategy, role)).twin for role in ROLES}
    found = {role: twin for role, twin in twins.items() if twin}
    return replace(strategy, **found) if found else strategy


@cache
def _beside(strategy: Strategy) -> Strategy:
    name = format_of(strategy.param).beside
    return replace(strategy, param=name) if name else strategy


# Those that take a model's weights as they are; the others those that `collage.fp8.convert` makes of them.
UNCONVERTED = tuple(name for name, strategy in STRATEGIES.items() if strategy.beside is strategy)


def require_unconverted(what: str, strategies: Iterable[Strategy]) -> None:
    """Raise ValueError, naming the parameter, for strategies of weights that have to be converted first."""
    for strategy in strategies:
        if strategy.beside is not strategy:
            raise ValueError(
                f"{what}: '{strategy}' trains what collage.fp8.convert(model) makes of linear layers, of which this "
                f"knows nothing; leave it out. Known: {', '.join(UNCONVERTED)}"
            )


@cache
def _parse(text: str) -> Strategy:
    text = text.strip()
    name = ALIASES.get(text, text)
    if name in STRATEGIES:
        return STRATEGIES[name]
    pairs = [(key.strip(), value.strip()) for key, _, value in (part.partition("=") for part in text.split(","))]
    if "=" in text and {key for key, _ in pairs} <= {f.name for f in fields(Strategy)}:
        return Strategy(**dict(pairs))
    close = get_close_matches(text, STRATEGIES, n=1)
    raise ValueError(
        f"strategy: unknown {text!r}; known: {', '.join(STRATEGIES)}; the paper's letters {', '.join(ALIASES)}; "
        "or a spec such as 'param=bf16x2,momentum=bf16,variance=bf16x2,arithmetic=float32'"
        + "".join(f"; did you mean {name!r}?" for name in close)
    )
