"""What IN is: a model, the state of its optimizer, and the run of `collage train` that they are a checkpoint of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collage.harness.convert import files
from collage.harness.convert.converting import STATE
from collage.harness.tasks.weights import ACCEPTED, IN_FOLDER, STATE_DICTS
from collage.harness.train import checkpoints

_STATES = ("optimizer", "optimizer_state_dict", "optim", "opt")  # where training loops put it


@dataclass(frozen=True)
class Source:
    """Where the parts of IN lie."""

    model: Path  # a file, or a folder
    state: Any = None  # what torch.load made of the optimizer's state
    where: str = ""  # that state came from
    checkpoint: Path | None = None  # of `collage train`
    folder: Path | None = None  # whose other files belong to the model


def find(path: Path, state: Path | None = None) -> Source:
    """The parts of IN. state: the file of the optimizer's state, if it is elsewhere.

    Raises ValueError, OSError for what holds no model, saying what was looked for.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; want {ACCEPTED}")
    folder = _checkpoint_in(path) if path.is_dir() else path
    if not folder.is_dir():
        return _of_file(path, state)
    if not any((folder / name).exists() for name in IN_FOLDER):
        raise FileNotFoundError(
            f"{folder}: no model in this folder; looked for checkpoint-N folders, {', '.join(IN_FOLDER)}"
        )
    own = state or (folder / STATE if (folder / STATE).exists() else None)
    is_ours = (folder / checkpoints.MANIFEST).exists()
    if is_ours:
        _require_whole(folder)
    return Source(folder, files.load(own) if own else None, str(own or ""), folder if is_ours else None, folder)


def _of_file(path: Path, state: Path | None) -> Source:
    if path.suffix in STATE_DICTS:
        content = files.load(path)
        if isinstance(content, dict) and "param_groups" in content:
            raise ValueError(
                f"{path}: an optimizer's state alone, and weights belong to it; give the model as IN, and this as "
                f"--optimizer {path}"
            )
        key = next((key for key in _STATES if isinstance(content, dict) and key in content), None)
        if state is None and key is not None:
            return Source(path, content[key], f"{path} ['{key}']")
        several = content.get("optimizer_states") if isinstance(content, dict) else None  # Lightning's
        if state is None and several:
            if len(several) > 1:
                raise ValueError(f"{path}: has the states of {len(several)} optimizers; give one as --optimizer FILE")
            return Source(path, several[0], f"{path} ['optimizer_states'][0]")
    return Source(path, files.load(state) if state else None, str(state or ""))


def _checkpoint_in(folder: Path) -> Path:
    """The newest checkpoint of a run's folder; the folder itself, if it is none."""
    found = checkpoints.all_in(folder)
    return found[-1] if found else folder


def _require_whole(checkpoint: Path) -> None:
    problem = checkpoints.problem_of(checkpoint)
    if problem:
        raise ValueError(f"{checkpoint}: {problem}; give another checkpoint")
