"""Checkpoints that are either whole or not there: written beside, listed in a manifest, synced, renamed.

`Trainer` writes a checkpoint file by file under its final name, and resumes silently, with other weights, from one that
lacks its optimizer or its scheduler. The manifest has a checksum of every file and of itself, so that what a disk or a
hand has changed since is found before it is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import collage

STAGING = ".writing"  # where a checkpoint grows: no name that Trainer takes for a checkpoint
MANIFEST = "complete.json"  # written last: what is in all other files, and what made them
FORMAT = 2  # of the checkpoint. Every later one keeps the manifest's "crc32" and "format"
REQUIRED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "progress.json")
_PREFIX, _ASIDE = "checkpoint-", "incomplete-"
_BEGIN_ANEW = "finish the run with the version that began it, or begin anew in another folder"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint, None for any other name."""
    digits = folder.name.removeprefix(_PREFIX)
    return int(digits) if folder.name.startswith(_PREFIX) and digits.isdecimal() else None


def all_in(run: Path) -> list[Path]:
    """All that look like checkpoints of a run, by step."""
    found = [(step, path) for path in run.glob(f"{_PREFIX}*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def publish(staged: Path, run: Path, origin: Mapping[str, Any]) -> Path:
    """Make a finished `staged` folder visible in the run's folder, all at once. Returns its new path.

    origin: what else the manifest is to say: "processes", and of the run what another one has otherwise.
    """
    files = {str(file.relative_to(staged)): file for file in sorted(staged.rglob("*")) if file.is_file()}
    listed = {name: {"size": file.stat().st_size, "crc32": _crc32(file)} for name, file in files.items()}
    content = {"format": FORMAT, "step": step_of(staged), "made_by": _versions(), **origin, "files": listed}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({**content, "crc32": seal(content)}, indent=1) + "\n", encoding="utf-8")
    for path in (*files.values(), manifest, staged):
        sync(path)
    target = run / staged.name
    os.replace(staged, target)
    sync(run)
    return target


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, None if there are none; and what is to be said of it and of newer ones.

    Damaged ones are set aside under another name, so that rotation does not count them and a later checkpoint can take
    their place.

    Raises:
        ValueError: no checkpoint is whole, or the newest is of another version. Nothing is set aside then.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(all_in(run)):
        problem = problem_of(path)
        if problem is None:
            return path, [*(_set_aside(*pair) for pair in damaged), *_of_other_versions(path)]
        damaged.append((path, problem))
    if damaged:
        problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        raise ValueError(
            f"--resume: no checkpoint in '{run}' is whole ({problems}); bring one back, or begin anew in another folder"
        )
    return None, []


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint."""
    content: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return content


def problem_of(checkpoint: Path) -> str | None:
    """How a checkpoint is damaged, or None. Reads all of it.

    Raises:
        ValueError: it is whole, and in the format of another version.
    """
    try:
        content = manifest_of(checkpoint)
        sealed = content.pop("crc32", None) == seal(content)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"its {MANIFEST} cannot be read"
    if not sealed:
        return f"its {MANIFEST} is damaged, or of a version of collage without checksums"
    if content["format"] != FORMAT:
        raise ValueError(
            f"--resume: {checkpoint.name} is a checkpoint in format {content['format']}, of collage "
            f"{content['made_by']['collage']}; collage {collage.__version__} reads format {FORMAT}: {_BEGIN_ANEW}"
        )
    if content["step"] != step_of(checkpoint):
        return f"its {MANIFEST} is of step {content['step']}"
    return _problem_of_files(checkpoint, content["files"], content["processes"])


def _problem_of_files(checkpoint: Path, listed: Mapping[str, Any], processes: int) -> str | None:
    there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()} - {MANIFEST}
    strangers = sorted(name for name in there - listed.keys() if not Path(name).name.startswith("."))
    if strangers:  # Trainer takes some for a part of the model
        return f"{strangers[0]} does not belong to it"
    for name in dict.fromkeys((*REQUIRED, *rng_files(processes), *listed)):
        if name not in there or name not in listed:
            return f"{name} is missing"
        size, expected = (checkpoint / name).stat().st_size, listed[name]["size"]
        if size != expected:
            return f"{name} has {size} bytes instead of {expected}"
        try:
            if _crc32(checkpoint / name) != listed[name]["crc32"]:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def rng_files(processes: int) -> list[str]:
    """Names of the random states: each process has its own."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def _set_aside(path: Path, problem: str) -> str:
    aside = path.with_name(_ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return f"skipped {path.name}: {problem}; set aside as {aside.name}"


def _of_other_versions(checkpoint: Path) -> list[str]:
    """A line if the checkpoint was written by other versions than are here: they are whole, later bits may differ."""
    made_by, here = manifest_of(checkpoint)["made_by"], _versions()
    other = [f"{name} {made_by.get(name)} (here {own})" for name, own in here.items() if made_by.get(name) != own]
    return [f"{checkpoint.name} was written by {', '.join(other)}: later bits may differ"] if other else []


def _versions() -> dict[str, str]:
    return {"collage": collage.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees a part of it."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(file: Path) -> int:
    """Of a file's contents; it finds what disks and hands do, about as fast as they read."""
    value = 0
    with file.open("rb") as contents:
        while block := contents.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def seal(content: Mapping[str, Any]) -> int:
    """The checksum of a manifest, which it has beside all else."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
