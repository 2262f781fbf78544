"""Checkpoints that are either whole or not there: written beside, listed in a manifest, synced, renamed.

`Trainer` writes a checkpoint file by file under its final name, and resumes silently, with other weights, from one that
lacks its optimizer or its scheduler.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

STAGING = ".writing"  # where a checkpoint grows: no name that Trainer takes for a checkpoint
MANIFEST = "complete.json"  # written last: the names and sizes of all other files
REQUIRED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
_PREFIX, _ASIDE = "checkpoint-", "incomplete-"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint, None for any other name."""
    digits = folder.name.removeprefix(_PREFIX)
    return int(digits) if folder.name.startswith(_PREFIX) and digits.isdecimal() else None


def all_in(run: Path) -> list[Path]:
    """All that look like checkpoints of a run, by step."""
    found = [(step, path) for path in run.glob(f"{_PREFIX}*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def publish(staged: Path, run: Path) -> Path:
    """Make a finished `staged` folder visible in the run's folder, all at once. Returns its new path."""
    files = [file for file in sorted(staged.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(staged)): file.stat().st_size for file in files}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"step": step_of(staged), "files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in (*files, manifest, staged):
        _sync(path)
    target = run / staged.name
    os.replace(staged, target)
    _sync(run)
    return target


def newest_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run; and for each newer one why it is not.

    The incomplete ones are set aside under another name, so that rotation does not count them and a later checkpoint
    can take their place.
    """
    skipped: list[str] = []
    for path in reversed(all_in(run)):
        problem = problem_of(path)
        if problem is None:
            return path, skipped
        aside = path.with_name(_ASIDE + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        skipped.append(f"skipped {path.name}: {problem}; set aside as {aside.name}")
    return None, skipped


def problem_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is incomplete, or None."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {str(name): int(size) for name, size in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name in (*REQUIRED, *sizes):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if name in sizes and file.stat().st_size != sizes[name]:
            return f"{name} has {file.stat().st_size} bytes instead of {sizes[name]}"
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees a part of it."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    _sync(beside)
    os.replace(beside, path)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
