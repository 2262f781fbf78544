"""What a run finds in its folder: nothing, an earlier run that is to go on, or another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from collage.harness import console, options
from collage.harness.tasks.data import Corpus
from collage.harness.tasks.examples import Examples
from collage.harness.tasks.games import Game
from collage.harness.tasks.material import Data
from collage.harness.text import to_json
from collage.harness.train import building, checkpoints, world
from collage.harness.train.config import RunConfig

SETTINGS, METRICS, RESULT = "settings.json", "metrics.jsonl", "result.json"

Key: TypeAlias = tuple[str, int]  # kind and step of a record


def already_finished(config: RunConfig, screen: Console) -> int | None:
    """Leave a finished run as it is. Returns its exit code; None: there is something to do."""
    result = config.out / RESULT
    if not result.exists():
        return None
    _require_same_run(config)
    diverged = _read(result, "val_loss")["val_loss"] is None
    how = "diverged; lower --lr and choose another --out" if diverged else "nothing left to do"
    console.say(screen, f"already finished: {how}; see {result}")
    return int(diverged)


def begin(config: RunConfig, data: Data, screen: Console) -> tuple[Path | None, set[Key]]:
    """Make the folder ready. Returns the checkpoint to go on from (None: begin), and what metrics.jsonl has already.

    Raises ValueError, before anything is written, for too little text, and for a folder that has another run.
    """
    building.require_enough(config, data)
    options.open_folder(config.out)
    if not config.resume:
        _require_empty(config.out)
    start = _checkpoint(config, data, screen) if config.resume and not isinstance(data, Game) else None
    shutil.rmtree(config.out / checkpoints.STAGING, ignore_errors=True)
    told = _forget_after(config.out / METRICS, checkpoints.step_of(start) if start else None)
    checkpoints.write_whole(config.out / SETTINGS, to_json(config.to_dict(), indent=1))
    return start, told


def _require_empty(out: Path) -> None:
    found = checkpoints.all_in(out)
    told = [path for path in (out / METRICS, out / RESULT) if path.exists() and path.stat().st_size]
    if found or told:
        fix = "add --resume to go on with it" if found else "empty it"
        raise ValueError(
            f"--out '{out}': holds {(told + found)[-1].name} of an earlier run; {fix}, or choose another folder"
        )


def _checkpoint(config: RunConfig, corpus: Corpus | Examples, screen: Console) -> Path | None:
    """The newest whole checkpoint, if it is of this run. Raises ValueError if it is not, or if none is whole."""
    _require_same_run(config)
    start, said = checkpoints.newest_whole(config.out)
    for line in said:
        console.say(screen, line)
    if start is None:
        console.say(screen, f"no complete checkpoint: starting from the beginning in {config.out}")
        return None
    origin = checkpoints.manifest_of(start)
    config.require_same_run(origin["run"], start.name)
    if origin["text"] != corpus.checksum():
        raise ValueError(
            f"--resume: {start.name} in '{config.out}' was trained on other text than --data, --validation and "
            "--tokenizer give now; bring that text back, or begin anew in another folder"
        )
    how = _other_world(config, corpus, start, origin)
    console.say(screen, f"going on from {start.name} in {config.out}{how}")
    return start


def _other_world(config: RunConfig, corpus: Corpus | Examples, start: Path, origin: Mapping[str, Any]) -> str:
    """What to say where other processes go on. Raises ValueError where these would have taken the text otherwise.

    The rest of an epoch that does not fill a step is one all the same where it fills a forward pass of each process.
    """
    before, now = origin["processes"], world.size()
    samples, step = len(building.datasets(config, corpus)[0]), checkpoints.step_of(start) or 0
    if before != now and samples % config.batch_size and step > samples // config.batch_size:
        kind = "examples" if isinstance(corpus, Examples) else "windows of text"
        raise ValueError(
            f"--resume: {start.name} was made by {before} processes, here are {now}; the {samples} {kind} are "
            f"not whole steps of {config.batch_size}, so that their epochs end differently. Start {before}"
        )
    same = before == now and origin["sharded"] == config.shard
    made = f"{before} process{'es' if before > 1 else ''}" + (", sharded" if origin["sharded"] else "")
    return "" if same else f"; it was made by {made}: the curve goes on, with other last bits"


def _require_same_run(config: RunConfig) -> None:
    settings = config.out / SETTINGS
    if settings.exists():
        config.require_same_run(_read(settings, "strategy"))


def _read(path: Path, key: str) -> dict[str, Any]:
    """A JSON file of a run, which has this key. Raises ValueError if something has damaged it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key], **content}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--resume: {path} cannot be read; delete it: checkpoints know their settings, and go on to the result"
        ) from None


def key(row: Mapping[str, Any]) -> Key:
    return row["kind"], row["step"]


def _forget_after(metrics: Path, step: int | None) -> set[Key]:
    """Keep only the records up to the checkpoint's step: the rest will be made again. Returns which are kept."""
    if not metrics.exists():
        return set()
    kept: dict[Key, str] = {}
    for number, line in enumerate(metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if step is not None and line.endswith("\n"):  # the last is cut off if the run was killed
            try:
                row = json.loads(line)
                kept |= {key(row): line} if row["step"] <= step else {}
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--resume: line {number} of {metrics} cannot be read; delete it: the records of its step are lost"
                ) from None
    checkpoints.write_whole(metrics, "".join(kept.values()))
    return set(kept)
