"""The files beside a model: of `collage train`, so that a converted run goes on, and of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from collage.harness.convert.converting import STATE, Conversions, Done
from collage.harness.convert.targets import Target
from collage.harness.text import to_json
from collage.harness.train import checkpoints
from collage.harness.train.resuming import METRICS, SETTINGS
from collage.optimizers.parameters import name_of

_BELONGS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")  # configurations and tokenizers
_RUNS = (checkpoints.MANIFEST, "trainer_state.json", "progress.json", SETTINGS, "result.json")


def write(
    plan: Conversions, checkpoint: Path, target: Target, folder: Path, out: Path, tick: Callable[[int], None]
) -> Done:
    """A run's folder with this one checkpoint, under the target's strategy: `collage train --resume` goes on."""
    staged = folder / checkpoints.STAGING / checkpoint.name
    staged.mkdir(parents=True)
    done = plan.write(staged, tick)
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and file.name not in (checkpoints.MANIFEST, STATE) and not _is_model(file):
            shutil.copy2(file, staged / file.name)
    _set_dtype(staged / "config.json", target)
    origin = checkpoints.manifest_of(checkpoint)
    kept = {key: value for key, value in origin.items() if key not in ("format", "step", "made_by", "files", "crc32")}
    kept["run"] = {**kept["run"], "strategy": target.name}
    checkpoints.publish(staged, folder, kept)
    shutil.rmtree(staged.parent)
    _copy_run(checkpoint.parent, folder, target, out)
    return done


def _copy_run(run: Path, folder: Path, target: Target, out: Path) -> None:
    """The settings, under the new strategy, and the records so far."""
    if (run / SETTINGS).exists():
        settings = json.loads((run / SETTINGS).read_text(encoding="utf-8"))
        settings |= {"strategy": target.name, "out": str(out)}
        (folder / SETTINGS).write_text(to_json(settings, indent=1), encoding="utf-8")
    if (run / METRICS).exists():
        shutil.copy2(run / METRICS, folder / METRICS)


def copy_model_files(source: Path, folder: Path, target: Target) -> None:
    """Configuration and tokenizer of a transformers model."""
    for pattern in _BELONGS:
        for file in sorted(source.glob(pattern)):
            if file.name not in _RUNS and not file.name.endswith(".index.json"):
                shutil.copy2(file, folder / file.name)
    _set_dtype(folder / "config.json", target)


def _set_dtype(config: Path, target: Target) -> None:
    """What transformers loads the weights in."""
    if not config.exists():
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in content:
            content[key] = name_of(target.strategy.dtype)
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_model(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.name.startswith("pytorch_model")
