"""Options of a command line from the fields of a dataclass: each is declared once, where it is kept."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from collage.strategies import Strategy

_METAVARS = {int: "N", float: "X"}


def option(
    group: str,
    says: str,
    default: Any = MISSING,
    *,
    metavar: str | tuple[str, ...] | None = None,
    choices: Sequence[str] | None = None,
    least: int | None = None,
    free: bool = False,
) -> Any:
    """A field that is also an option.

    Args:
        group: title of its group in the help.
        says: its help; the default is added.
        default: of the field.
        metavar: what its value is called, if not by its type.
        choices: all that it may be.
        least: the smallest integer it may be.
        free: whether it may differ in the run that continues another.
    """
    about = {"group": group, "says": says, "metavar": metavar, "choices": choices, "least": least, "free": free}
    return field(default=default, metadata=about)


def add_options(parser: argparse.ArgumentParser, kind: type, groups: Sequence[str], **defaults: Any) -> None:
    """The options of these groups of a dataclass; `defaults` are used instead of the fields' own."""
    types = get_type_hints(kind)
    for title in groups:
        group = parser.add_argument_group(title)
        for f in fields(kind):
            if f.metadata.get("group") == title:
                own = None if f.default is MISSING else f.default
                _add(group, f, types[f.name], defaults.get(f.name, own))


def _add(group: argparse._ArgumentGroup, f: Field[Any], kind: Any, default: Any) -> None:
    says, flag = f.metadata["says"], flag_of(f.name)
    if kind is bool:
        group.add_argument(flag, action="store_true", help=says)
        return
    kind = next((one for one in get_args(kind) if NoneType in get_args(kind)), kind)  # str, of str | None
    inner = get_args(kind)
    value = inner[0] if inner else kind  # of tuple[float, float], tuple[str, ...]
    many: Any = ("+" if Ellipsis in inner else len(inner)) if get_origin(kind) is tuple else None
    told = "" if default is None or default == () else " (default: %(default)s)"
    choices = f.metadata["choices"]
    metavar = f.metadata["metavar"] or (None if choices else _METAVARS.get(value))
    group.add_argument(
        flag, type=value, nargs=many, default=default, choices=choices, metavar=metavar, help=says + told
    )


def flag_of(name: str) -> str:
    """micro_batch -> --micro-batch."""
    return f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields that have a value on the command line, or a default of their option."""
    known = {f.name for f in fields(kind)}
    found = {name: value for name, value in vars(args).items() if name in known and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def flags_named(kind: type) -> AbstractContextManager[None]:
    """A ValueError that begins with a field of a dataclass, "micro_batch: ...", begins with its flag instead."""
    return flags_of({f.name for f in fields(kind)})


@contextmanager
def flags_of(names: Collection[str]) -> Iterator[None]:
    """The same, of these names."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if name not in names:
            raise
        raise ValueError(f"{flag_of(name)}{colon}{rest}") from None


def strategy(where: str, name: str) -> str:
    """The canonical name of a strategy. Raises ValueError naming the field or flag."""
    try:
        return str(Strategy.parse(name))
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('strategy: ')}") from None


def split(names: str) -> list[str]:
    """Names at the commas between strategies; those inside a spec, param=...,variance=..., stay."""
    parts: list[str] = []
    for part in names.split(","):
        if "=" in part and not part.startswith("param=") and parts and "=" in parts[-1]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [part.strip() for part in parts]


def require_file(flag: str, path: Path | None) -> None:
    """Raises ValueError if a file that is asked for cannot lie there; before the work whose result it is."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{flag} '{path}': no folder {path.parent}; make it, or choose another")
    if path.is_dir():
        raise ValueError(f"{flag} '{path}': is a folder; give a file in it")


def open_folder(out: Path) -> Path:
    """Make the folder of the results. Raises ValueError if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out '{out}': cannot be written to ({error.strerror}); choose another folder") from None
    return out
