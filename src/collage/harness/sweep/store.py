"""Finished runs, a JSON file for each, found again by what was asked for."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import collage
from collage.harness.train.checkpoints import seal, write_whole
from collage.harness.train.config import RunConfig
from collage.harness.train.training import RunResult
from collage.monitor.quality import jsonable

FORMAT = 1
STORE = "runs"  # its folder, in that of a sweep
# Settings that leave the weights as they are, but not what is measured of them.
_MEASURED = ("every", "shadow", "eval_sequences")
_HASH = 12  # hex digits in a name: two of a million runs share one with a chance of 2e-3, and are told apart when read


@dataclass(frozen=True)
class Asked:
    """What a run was asked to do: all that changes its result, but for the machine.

    Args:
        task: its name.
        settings: of the run, `RunConfig.bound()` and what is measured, without those that were left unset: a run is
            still found when there is more that can be set.
        start: of the run whose weights it goes on from; None: from what the task starts with.
    """

    task: str
    settings: Mapping[str, Any]
    start: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, task: str, config: RunConfig, start: RunConfig | None = None) -> Asked:
        measured = {name: getattr(config, name) for name in _MEASURED}
        return cls(task, _set({**config.bound(), **measured}), _set(start.bound()) if start else None)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"task": self.task, "settings": dict(self.settings), "start": dict(self.start) if self.start else None}

    @property
    def name(self) -> str:
        """What a reader looks for first, then a hash of everything."""
        about = self.settings
        words = "-".join([self.task, about["model"], about["strategy"], f"seed{about['seed']}"])
        text = json.dumps(self.to_dict(), sort_keys=True)
        return f"{re.sub('[^A-Za-z0-9.-]+', '_', words)}-{hashlib.sha256(text.encode()).hexdigest()[:_HASH]}"


@dataclass(frozen=True)
class Stored:
    """A finished run.

    Attributes:
        asked: for what.
        run: `RunResult.to_dict()` and the curve; a loss that was not finite is NaN.
        seconds: of all of it, what had to be made before it too.
        made_by: version, machine, time.
    """

    asked: Asked
    run: Mapping[str, Any]
    seconds: float
    made_by: Mapping[str, Any]

    @property
    def machine(self) -> str:
        """Its class: what decides bits, and how long a run takes."""
        return machine_class(self.made_by["machine"])


class Store:
    """A folder of finished runs. A file is whole or not there; one that was damaged since is told, and made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[str] = []  # of files that cannot be used

    def find(self, asked: Asked) -> Stored | None:
        """The run that was asked for, if it is finished."""
        path = self._path(asked)
        stored = self._read(path) if path.exists() else None
        if stored is not None and stored.asked.to_dict() != asked.to_dict():
            return self._unusable(path, "is of a run with other settings")
        return stored

    def all(self) -> list[Stored]:
        """Every finished run, by name."""
        return [stored for path in sorted(self.folder.glob("*.json")) if (stored := self._read(path)) is not None]

    def add(self, asked: Asked, result: RunResult, seconds: float, about: Mapping[str, str]) -> Stored:
        """Keep what a run gave.

        Args:
            asked: what it was to do.
            result: what it gave.
            seconds: of all of it, what had to be made before it too.
            about: `machine()`.
        """
        content = jsonable(
            {
                "format": FORMAT,
                "asked": asked.to_dict(),
                "run": {**result.to_dict(), "curve": {str(step): loss for step, loss in result.curve.items()}},
                "seconds": seconds,
                "made_by": {
                    "version": collage.__version__,
                    "machine": dict(about),
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                },
            }
        )
        write_whole(self._path(asked), json.dumps({**content, "crc32": seal(content)}, indent=1) + "\n")
        return _stored(content)

    def _path(self, asked: Asked) -> Path:
        return self.folder / f"{asked.name}.json"

    def _read(self, path: Path) -> Stored | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            whole = content.pop("crc32", None) == seal(content)
        except (OSError, ValueError, AttributeError, TypeError):
            return self._unusable(path, "cannot be read")
        if not whole:
            return self._unusable(path, "has other contents than were written")
        if content["format"] != FORMAT:
            return self._unusable(path, f"is in format {content['format']}, not {FORMAT}")
        return _stored(content)

    def _unusable(self, path: Path, problem: str) -> Stored | None:
        line = f"{path.name} {problem}: that run is not counted"
        if line not in self.told:
            self.told.append(line)
        return None


def _set(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None and value is not False and value != []}


def machine_class(about: Mapping[str, Any]) -> str:
    """The part of `machine()` that decides bits and speed: "AMD EPYC, avx512 kernels, float32, ..."."""
    kernels = f"{about['kernels']} kernels" if " " not in about["kernels"] else about["kernels"]
    torch = re.sub(r"\+.*", "", about["torch"])
    return f"{about['cpu']}, {kernels}, {about['compute']}, threads {about['threads']}, torch {torch}"


def _stored(content: Mapping[str, Any]) -> Stored:
    run = dict(content["run"])
    run["val_loss"] = math.nan if run["val_loss"] is None else run["val_loss"]  # as it was; JSON has no such number
    return Stored(Asked(**content["asked"]), run, content["seconds"], content["made_by"])
