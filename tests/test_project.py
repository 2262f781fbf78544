"""The shape of the project: which room may import which, and what `import collage` costs."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "collage"

# Room -> the rooms it may import. A new room needs a row here. "collage" is the package's own __init__.py.
NUMBERS = {"mcf", "rng", "accumulators", "formats", "strategies", "constants"}
STEP = NUMBERS | {"rules", "backends", "sharding", "state", "loading", "shadow", "monitor"}
LIBRARY = STEP | {"saying", "settings", "admission", "edits", "optim", "adamw", "casting", "wrap", "gradients"}
LIBRARY |= {"owners", "checkpoint", "lending", "ema"}
ALLOWED = {
    "mcf": set(),
    "rng": set(),
    "constants": {"mcf"},
    "accumulators": {"mcf", "rng"},
    "formats": {"mcf", "rng", "accumulators"},
    "strategies": {"formats"},
    "rules": {"mcf", "accumulators", "constants"},
    "backends": NUMBERS | {"rules"},
    "sharding": {"backends"},
    "state": NUMBERS | {"rules", "sharding"},
    "loading": NUMBERS | {"rules", "settings", "state"},
    "shadow": NUMBERS | {"rules", "backends"},
    "monitor": NUMBERS | {"rules", "backends", "shadow", "state"},
    "saying": set(),
    "settings": set(),
    "edits": NUMBERS | {"backends", "saying"},
    "calls": STEP | {"edits"},
    "admission": STEP | {"saying"},
    "optim": STEP | {"admission", "calls", "edits", "saying", "settings"},
    "adamw": STEP | {"optim", "settings"},
    "casting": {"sharding", "state"},
    "lending": {"edits", "saying", "sharding"},
    "ema": STEP | {"edits", "lending", "owners", "checkpoint"},
    "owners": STEP | {"optim"},
    "checkpoint": STEP | {"edits", "owners"},
    "gradients": STEP | {"optim"},
    "wrap": STEP | {"optim"},
    "collage": LIBRARY,
    "integrations": LIBRARY | {"collage"},
    "__main__": {"harness"},
    "harness": LIBRARY | {"collage", "integrations"},
}

# Module from outside -> the only rooms that may import it. `sharding` exists to know DTensor.
ABOVE = ALLOWED.keys() - STEP
EXTRAS = ("accelerate", "matplotlib", "rich", "safetensors", "tensorboard", "tokenizers", "transformers")
RESERVED = {
    "torch.optim": ABOVE,
    "torch.distributed": ABOVE | {"sharding"},
    "logging": ABOVE,
    "triton": {"backends"},
    **{extra: {"harness", "integrations"} for extra in EXTRAS},
}

# What `import collage` must not bring in.
HEAVY = (
    *EXTRAS,
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.tensorboard", "triton"),
    *("collage.harness", "collage.integrations"),
)


def within(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def room_of(module: str) -> str:
    """collage.rules.adamw -> rules; collage and its public names, collage.AdamW, -> collage."""
    name = module.partition(".")[2].partition(".")[0]
    return name if name in ALLOWED else "collage"


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that a module of `package` imports, anywhere; `torch.x` in code counts."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*parents, *([node.module] if node.module else [])])
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.Attribute(value=ast.Name(id="torch")):
                yield f"torch.{node.attr}"


def forbidden(room: str, source: str, package: str = "collage") -> list[str]:
    """What a module of this room imports against the tables."""
    assert room in ALLOWED, f"room '{room}' is new: give it a row in ALLOWED"

    def against(name: str) -> bool:
        if within(name, ["collage"]):
            return room_of(name) not in ALLOWED[room] | {room}
        return within(name, (module for module, rooms in RESERVED.items() if room not in rooms))

    return sorted(filter(against, imports(source, package)))


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: path.relative_to(SRC).as_posix())
def test_rooms_depend_one_way(path: Path) -> None:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    room = "collage" if path == SRC / "__init__.py" else parts[1]
    found = forbidden(room, path.read_text(encoding="utf-8"), package=".".join(parts[:-1]))
    assert not found, f"room '{room}' must not import {', '.join(found)}"


@pytest.mark.parametrize(
    ("room", "package", "source", "found"),
    [
        ("mcf", "collage", "from .formats import BF16", ["collage.formats.BF16"]),
        ("mcf", "collage", "from . import rng", ["collage.rng"]),
        ("formats", "collage", "def f():\n    import collage.optim as o", ["collage.optim"]),
        ("formats", "collage", "from collage import AdamW", ["collage.AdamW"]),
        ("rules", "collage.rules", "from .. import formats", ["collage.formats"]),
        ("rules", "collage.rules", "from ..accumulators import grown\nfrom . import adamw", []),
        ("backends", "collage.backends.triton", "from ...rules import adamw\nimport triton.language", []),
        ("collage", "collage", "from .harness import cli", ["collage.harness.cli"]),
        ("monitor", "collage", "import torch\ntorch.optim.AdamW", ["torch.optim"]),
        ("monitor", "collage", "from torch import distributed", ["torch.distributed"]),
        ("sharding", "collage", "from torch.distributed.tensor import DTensor\nimport logging", ["logging"]),
        ("optim", "collage", "import logging, rich.table, richer", ["rich.table"]),
        ("harness", "collage.harness", "import rich, collage\nfrom ..optim import AdamW", []),
    ],
)
def test_a_forbidden_import_is_found(room: str, package: str, source: str, found: list[str]) -> None:
    assert forbidden(room, source, package) == found


def test_import_is_light() -> None:
    """`import collage` brings in none of HEAVY that `import torch` did not."""
    code = "import sys, torch; torchs = set(sys.modules); import collage; print(*sys.modules.keys() - torchs)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    added = run.stdout.split()
    assert "collage" in added
    assert [name for name in added if within(name, HEAVY)] == []
