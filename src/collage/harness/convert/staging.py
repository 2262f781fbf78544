"""A folder that is whole or not there: written beside, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from collage.harness.train.checkpoints import sync


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to, which becomes `out` at the end, and is gone after an error.

    Raises ValueError where `out` holds something, without `overwrite`. What a killed run has left is removed.
    """
    beside, aside = out.parent / f".{out.name}.writing", out.parent / f".{out.name}.replaced"
    if aside.exists() and not out.exists():
        aside.rename(out)  # killed between the two renames below
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; choose another OUT, or say --overwrite")
    for left in (beside, aside):
        shutil.rmtree(left, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written to ({error.strerror}); choose another OUT") from None
    try:
        yield beside
        _publish(beside, out, aside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _publish(beside: Path, out: Path, aside: Path) -> None:
    for path in sorted(beside.rglob("*"), reverse=True):  # files before their folders
        sync(path)
    sync(beside)
    if out.exists():
        out.rename(aside)
    beside.rename(out)
    sync(out.parent)
    if aside.is_dir():
        shutil.rmtree(aside)
    elif aside.exists():
        os.unlink(aside)
