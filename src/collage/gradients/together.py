"""Parameters whose small gradients wait for one another, because a call for each costs more than what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakMethod

from torch import Tensor

BYTES = 1 << 20  # of gradients, with which they wait no longer


def on_arrival(param: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Call a method whenever backward has left a gradient in a parameter, as long as somebody has its object.

    Returns a handle with ``remove()``. The garbage collector does not see a tensor's hooks: one that has its object,
    which has the tensor, would keep both for ever.
    """
    method, untyped = WeakMethod(hook), cast("Any", param)

    def call(param: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(param)

    return untyped.register_post_accumulate_grad_hook(call)


class Together:
    """Collects parameters with gradients until these have a megabyte, and then uses them."""

    def __init__(self, use: Callable[[Sequence[Tensor]], None]) -> None:
        self._use = WeakMethod(use)  # of who has this, and is gone as soon as nobody has it
        self._waiting, self._bytes = dict[int, Tensor](), 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._waiting

    def add(self, param: Tensor) -> None:
        """Have it wait; one that waits already has one gradient still."""
        assert param.grad is not None
        self._waiting[id(param)] = param
        self._bytes += param.grad.numel() * param.grad.itemsize
        if self._bytes >= BYTES:
            self.flush()

    def flush(self) -> None:
        """Use those that wait."""
        waiting = self.drop()
        use = self._use()
        if waiting and use is not None:
            use(waiting)

    def drop(self) -> list[Tensor]:
        """Let them go, unused."""
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        return list(waiting.values())
