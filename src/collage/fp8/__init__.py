"""FP8 weights without master weights: linear layers that multiply with the weight's first component itself."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collage.fp8.converting import convert
    from collage.fp8.exporting import export
    from collage.fp8.linear import Float8Linear

__all__ = ["Float8Linear", "convert", "export"]

# Imported when they are first asked for: the layer brings torch.compile's modules, which `import collage` does without.
_WHERE = {"Float8Linear": "linear", "convert": "converting", "export": "exporting"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
