"""`collage convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from collage.harness import console, options
from collage.harness.convert import runs, shown, sources, states, targets
from collage.harness.convert.converting import Conversions, Done
from collage.harness.convert.models import opened
from collage.harness.convert.sources import Source
from collage.harness.convert.staging import staged
from collage.harness.convert.targets import Target
from collage.harness.tasks.weights import ACCEPTED
from collage.harness.text import to_json

ABOUT = f"""\
IN   {ACCEPTED};
     one file or many. The state of its optimizer is taken from optimizer.pt in the folder, from the same file, or from
     --optimizer FILE: ours, torch.optim's, TransformerEngine's or Apex's. Names say which state is of which weight, or
     the order of a state dict, or the class in a transformers model's config.json.
OUT  becomes a folder with model.safetensors (as many files as IN has) and optimizer.pt, for opt.load_state_dict after
     the model's. It is there as a whole or not at all. Of a run of collage train it is one that --resume goes on with.

TARGET is one of
{{targets}}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = f"{parser.description}\n\n{ABOUT.format(targets=targets.described())}"
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a model, with or without the state of its optimizer")
    add("out", type=Path, metavar="OUT", help="the folder to be made")
    add("--to", required=True, metavar="TARGET", help="what it becomes")
    add("--optimizer", type=Path, metavar="FILE", help="the optimizer's state, if it is not in IN")
    add("--cut", action="store_true", help="bfloat16 weights in IN with 16-bit remainders were cut off, not rounded")
    add("--overwrite", action="store_true", help="replace OUT, once all is written")
    add("--json", type=Path, metavar="FILE", help="also write every number to FILE")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was rounded. Returns the exit status."""
    target = targets.target_of(args.to)
    _require_apart(args.source, args.out)
    options.require_file("--json", args.json)
    source = sources.find(args.source, args.optimizer)
    screen = Console()
    with opened(source.model) as model:
        saved = None if source.state is None else states.read(source.state, source.where)
        plan = Conversions(model, saved, target, source.where or str(source.model), args.cut)
        with staged(args.out, args.overwrite) as folder, console.progress(screen) as bars:
            tick = console.bar(bars, f"to {target.name}", sum(plan.about(name).nbytes for name in model.about))
            done = _write(plan, source, target, folder, args.out, tick)
    shown.show(done, source, target, args.out, screen)
    if args.json:
        args.json.write_text(to_json(shown.to_dict(done, target), indent=1), encoding="utf-8")
    return 0


def _write(plan: Conversions, source: Source, target: Target, folder: Path, out: Path, tick: console.Tick) -> Done:
    """Everything that OUT is to hold."""
    if source.checkpoint is not None and target.is_ours:
        return runs.write(plan, source.checkpoint, target, folder, out, tick)
    done = plan.write(folder, tick)
    if source.folder is not None:
        runs.copy_model_files(source.folder, folder, target)
    return done


def _require_apart(source: Path, out: Path) -> None:
    a, b = source.resolve(), out.resolve()
    if a == b or b in a.parents:
        raise ValueError(f"{out}: is IN, or IN lies in it; choose another OUT")
