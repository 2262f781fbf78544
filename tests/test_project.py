"""The shape of the project: which room may import which, and what `import collage` costs."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "collage"

# Room -> the rooms it may import. A new room needs a row here. "collage" is the package's own __init__.py.
NUMBERS = {"rounding", "mcf", "rng", "accumulators", "layout", "formats", "strategies"}
STEP = NUMBERS | {"rules", "backends", "sharding", "collectives", "unwrapping", "monitor", "advised", "numerals"}
LIBRARY = STEP | {
    "conversion",
    "saying",
    "optimizers",
    "casting",
    "fp8",
    "owners",
    "checkpoint",
    "lending",
    "ema",
    "floors",
    "gradients",
    "advice",
}
ALLOWED = {
    "rounding": set(),
    "mcf": {"rounding"},
    "rng": set(),
    "accumulators": {"mcf", "rng"},
    "layout": set(),
    "formats": {"rounding", "mcf", "rng", "accumulators", "layout"},
    "strategies": {"formats", "layout"},
    "floors": {"mcf", "formats", "layout", "strategies"},
    "rules": {"mcf", "accumulators"},
    "backends": NUMBERS | {"rules"},
    "sharding": {"backends"},
    "collectives": {"sharding"},
    "unwrapping": set(),
    "monitor": NUMBERS | {"rules", "backends", "sharding", "collectives", "unwrapping", "advised"},
    "saying": set(),
    "randomness": set(),
    "numerals": set(),
    "advised": {"numerals"},
    "advice": STEP | {"floors", "optimizers", "saying"},
    "conversion": NUMBERS | {"backends"},
    "fp8": {"formats", "layout", "sharding", "casting", "saying"},
    "optimizers": STEP | {"conversion", "saying", "randomness", "fp8", "casting"},
    "casting": {"layout", "sharding"},
    "lending": {"backends", "fp8", "optimizers", "saying", "sharding"},
    "ema": STEP | {"optimizers", "casting", "lending", "owners", "checkpoint", "fp8"},
    "gradients": STEP | {"optimizers", "owners", "randomness"},
    "owners": STEP | {"optimizers", "fp8"},
    "checkpoint": STEP | {"optimizers", "casting", "owners", "saying", "fp8"},
    "collage": LIBRARY,
    "integrations": LIBRARY | {"collage"},
    "__main__": {"harness.cli"},
}

# The same within the harness, whose rooms may import all below it. `cli` knows the commands by name alone.
HARNESS = {
    "__init__": set(),
    "cli": set(),
    "machine": set(),
    "options": set(),
    "text": set(),
    "console": {"text"},
    "tasks": set(),
    "report": {"tasks", "text"},
    "train": {"console", "options", "tasks", "text"},
    "rl": {"tasks", "train"},
    "experiment": {"report", "tasks", "train"},
    "compare": {"console", "experiment", "machine", "options", "report", "tasks", "text", "train"},
    "advise": {"console", "options", "plan", "tasks", "text"},
    "sweep": {"compare", "console", "experiment", "machine", "options", "report", "tasks", "text", "train"},
    "results": {"console", "experiment", "options", "report", "sweep", "tasks", "text", "train"},
    "preflight": {"console", "options", "tasks", "text"},
    "convert": {"console", "options", "tasks", "text", "train"},
    "ledger": set(),
    "bench": {"console", "ledger", "machine", "options", "report", "tasks", "text"},
    "plan": {"bench", "console", "ledger", "options", "tasks", "text", "train"},
    "info": {"console", "text"},
}
BELOW_HARNESS = LIBRARY | {"collage", "integrations"}
ALLOWED |= {f"harness.{room}": BELOW_HARNESS | {f"harness.{r}" for r in rooms} for room, rooms in HARNESS.items()}

# Module from outside -> the only rooms that may import it. `sharding` exists to know DTensor, `collectives` for ranks.
ABOVE = ALLOWED.keys() - STEP
EXTRAS = ("accelerate", "lightning", "matplotlib", "rich", "safetensors", "tensorboard", "tokenizers", "transformers")
RESERVED = {
    "torch.optim": ABOVE,
    "torch.distributed": ABOVE | {"sharding", "collectives"},
    "logging": ABOVE,
    "triton": {"backends"},
    **{extra: {"integrations", *(f"harness.{room}" for room in HARNESS)} for extra in EXTRAS},
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
    """collage.rules.adamw -> rules; collage.harness.cli -> harness.cli; collage and its public names -> collage."""
    _, *parts = module.split(".")
    return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in ALLOWED), "collage")


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
    room = "collage" if path == SRC / "__init__.py" else ".".join(parts[1 : 3 if parts[1] == "harness" else 2])
    found = forbidden(room, path.read_text(encoding="utf-8"), package=".".join(parts[:-1]))
    assert not found, f"room '{room}' must not import {', '.join(found)}"


@pytest.mark.parametrize(
    ("room", "package", "source", "found"),
    [
        ("mcf", "collage", "from .formats import BF16", ["collage.formats.BF16"]),
        ("mcf", "collage", "from . import rng, rounding", ["collage.rng"]),
        ("formats", "collage", "def f():\n    import collage.optimizers as o", ["collage.optimizers"]),
        ("formats", "collage", "from collage import AdamW", ["collage.AdamW"]),
        ("rules", "collage.rules", "from .. import formats", ["collage.formats"]),
        ("rules", "collage.rules", "from ..accumulators import grown\nfrom . import adamw", []),
        ("backends", "collage.backends.triton", "from ...rules import adamw\nimport triton.language", []),
        ("collage", "collage", "from .harness import cli", ["collage.harness.cli"]),
        ("monitor", "collage", "import torch\ntorch.optim.AdamW", ["torch.optim"]),
        ("monitor", "collage", "from torch import distributed", ["torch.distributed"]),
        ("sharding", "collage", "from torch.distributed.tensor import DTensor\nimport logging", ["logging"]),
        ("optimizers", "collage", "import logging, rich.table, richer", ["rich.table"]),
        ("harness.info", "collage.harness", "import rich, collage\nfrom ..optimizers import adamw", []),
        (
            "harness.train",
            "collage.harness.train",
            "from ..compare import verdict",
            ["collage.harness.compare.verdict"],
        ),
        ("harness.options", "collage.harness", "from . import console, options", ["collage.harness.console"]),
    ],
)
def test_a_forbidden_import_is_found(room: str, package: str, source: str, found: list[str]) -> None:
    assert forbidden(room, source, package) == found


def test_no_room_depends_on_itself_through_others() -> None:
    graphlib.TopologicalSorter(ALLOWED).prepare()


def neighbours(path: Path, modules: Iterable[str]) -> set[str]:
    """The modules of the package that a module imports, anywhere in its code."""
    package = ".".join(path.relative_to(SRC.parent).parts[:-1])
    names = imports(path.read_text(encoding="utf-8"), package)
    return {module for name in names for module in (name, name.rpartition(".")[0]) if module in modules}


def test_no_module_of_the_harness_depends_on_itself_through_others() -> None:
    paths = {".".join(p.relative_to(SRC.parent).with_suffix("").parts): p for p in (SRC / "harness").rglob("*.py")}
    graph = {module: neighbours(path, paths) for module, path in paths.items()}
    assert len([other for others in graph.values() for other in others]) > 50
    graphlib.TopologicalSorter(graph).prepare()


def test_import_is_light() -> None:
    """`import collage` brings in none of HEAVY that `import torch` did not."""
    code = "import sys, torch; torchs = set(sys.modules); import collage; print(*sys.modules.keys() - torchs)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    added = run.stdout.split()
    assert "collage" in added
    assert [name for name in added if within(name, HEAVY)] == []
