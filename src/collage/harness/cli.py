"""The `collage` command."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from collage import __version__

EXTRA = "pip install '.[train]' in the folder of collage's source"

# Command -> (module here with add_arguments and run, one line, examples).
COMMANDS = {
    "compare": (
        "compare.command",
        "train one model under several precision strategies and show what each loses",
        "collage compare --finetune\n"
        "  collage compare --model tiny-bert --seeds 3 --strategies bf16,collage-plus,fp32-master",
    ),
    "sweep": (
        "sweep.command",
        "the same over the values of one setting: where each strategy starts to lose",
        "collage sweep --task finetune --axis lr --values 1e-6,1e-5,1e-4 --strategies bf16,collage-plus,fp32-master\n"
        "  collage sweep --axis beta2 --seeds 3",
    ),
    "results": (
        "results.command",
        "make the runs behind docs/results.md that are missing, and write that page",
        "collage results\n  collage results --only finetune vision-vit\n  collage results --no-runs",
    ),
    "preflight": (
        "preflight.command",
        "say, without training, which weights a learning rate cannot move in which format",
        "collage preflight model.safetensors --lr 1e-5 --weight-decay 0.1",
    ),
    "advise": (
        "advise.command",
        "say which strategy to take for a model, a learning rate and a number of steps, and why",
        "collage advise tiny-llama --lr 1e-5 --weight-decay 0.1 --steps 1000\n"
        "  collage advise model.safetensors --lr 1e-5 --steps 20000 --memory 24GB --ranks 8\n"
        "  collage advise model.safetensors --lr 1e-4 --tuned-under bf16",
    ),
    "train": (
        "train.command",
        "train under one strategy, with checkpoints, resume and EDQ in the log",
        "collage train --strategy collage-plus --out runs/mine --save-every 100\n"
        "  collage train --strategy collage-plus --out runs/mine --save-every 100 --resume\n"
        "  torchrun --nproc-per-node 2 -m collage train --shard --out runs/two",
    ),
    "bench": (
        "bench.command",
        "time a step of the optimizer against others and against the memory's limit",
        "collage bench\n  collage bench --params 1M --shapes small --no-others",
    ),
    "plan": (
        "plan.command",
        "predict how much memory a training step takes under each strategy, and measure it",
        "collage plan gpt2-xl --sequences 1 --length 512 --memory 24GB\n"
        "  collage plan llama-3-8b --ranks 8 --memory 80GB\n"
        "  collage plan tiny-llama --strategies collage-plus,fp32-master --measure",
    ),
    "convert": (
        "convert.command",
        "take a model and its optimizer's state to another strategy, or to torch.optim, and say what that rounds",
        "collage convert runs/mine runs/exact --to collage-exact\n"
        "  collage convert model.safetensors converted --to collage-plus\n"
        "  collage convert runs/mine leaving --to torch",
    ),
    "info": ("info", "show versions, backends and the table of strategies", "collage info"),
}


def parser() -> argparse.ArgumentParser:
    """All commands, without the options of any: those are added once the command is known."""
    result = argparse.ArgumentParser(
        prog="collage",
        description="Train in bfloat16 without float32 master weights, and measure what rounding loses.",
        epilog="collage COMMAND --help says more.",
    )
    result.add_argument("--version", action="version", version=f"collage {__version__}")
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, line, _) in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Errors that a user can mend are one line on stderr, exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = parser().parse_known_args(argv)[0].command
    name, line, examples = COMMANDS[command]
    own = argparse.ArgumentParser(
        prog=f"collage {command}",
        description=line[0].upper() + line[1:] + ".",
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        module = importlib.import_module(f"collage.harness.{name}")
        module.add_arguments(own)
        return int(module.run(own.parse_args(argv[argv.index(command) + 1 :])))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "collage":
            raise
        return _fail(f"'collage {command}' needs {package}: {EXTRA}")
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error))


def shell() -> NoReturn:
    """What a shell starts: `main`, and then the end of this process."""
    try:
        code = main()
    except SystemExit as end:
        code = int(str(end.code or 0))
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process; where others train with it, without the interpreter's own end.

    A worker of gloo lets go of a collective's tensors after those who waited for it went on. If by then the interpreter
    is ending, torch asks for its lock all the same, and CPython (before 3.14) ends that thread by unwinding it, which
    aborts the process. Destroying the group waits for its workers only if nobody refers to it, as caches of DTensor do.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str) -> int:
    print(f"collage: {message}", file=sys.stderr)
    return 2
