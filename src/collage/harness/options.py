"""What the commands' options share: a strategy by its name, and the folder of the results."""

from __future__ import annotations

from pathlib import Path

from collage.strategies import Strategy


def strategy(flag: str, name: str) -> str:
    """The canonical name of a strategy. Raises ValueError naming the flag."""
    try:
        return str(Strategy.parse(name))
    except ValueError as error:
        raise ValueError(f"{flag}: {str(error).removeprefix('strategy: ')}") from None


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
