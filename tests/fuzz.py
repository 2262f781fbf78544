"""Random sequences of what a training loop and others do to weights, against a float64 model of what a user expects.

    python tests/fuzz.py --seconds 60            # make fuzz SECONDS=60
    python tests/fuzz.py --once 17 --keep 0,3    # one sequence again, of it only these actions

Every sequence runs in a process of its own, so a crash is seen with its seed. A failure is shrunk, printed with the
command that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import re
import signal
import sys
import time
import traceback
import warnings

import conftest  # noqa: F401  (the environment; kernels of another build)
import torch
import torch._dynamo  # torch's Optimizer imports it at first use: once here, not in every child
from fuzzing.actions import ACTIONS
from fuzzing.world import World

# ---- running


def sequence(seed, keep, trail):
    """Run the actions of a seed, or of them only those kept. Each has random numbers of its own."""
    rng = random.Random(seed)
    plan = rng.choices(list(ACTIONS), ACTIONS.values(), k=rng.randint(4, 30))
    w = World(random.Random(f"{seed}"), trail)
    for i, action in enumerate(plan):
        if keep is None or i in keep:
            trail(f"{i} {action.__name__}")
            w.rng, w.g = random.Random(f"{seed}:{i}"), torch.Generator().manual_seed(seed * 1000 + i)
            action(w)
            w.check()
    trail(f"every bit: {w.digest()}")
    return w.steps


def run(seed, keep=None):
    """(steps, what happened, the error or None), in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.dup2(write, sys.stderr.fileno())  # what a sanitizer says
        faulthandler.enable()
        signal.alarm(60)  # a hang is a failure too

        def say(line):
            os.write(write, (line + "\n").encode())

        try:
            say(f"= {sequence(seed, keep, say)}")
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in frames[:-6:-1])
            say(f"! {type(error).__name__}: {error} [{where}]".replace("\n", " "))
        os._exit(0)
    os.close(write)
    with open(read, errors="replace") as pipe:
        lines = pipe.read().splitlines()
    status = os.waitpid(child, 0)[1]
    last = lines[-1] if lines else ""
    if os.WIFSIGNALED(status):
        return 0, lines, f"! killed by {signal.Signals(os.WTERMSIG(status)).name}"
    if status:
        return 0, lines, f"! exit status {os.waitstatus_to_exitcode(status)}"
    return (int(last[2:]), lines, None) if last[:2] == "= " else (0, lines[:-1], last)


def kind(error):
    """What two failures of one cause have in common: the error without its names and numbers."""
    return re.sub(r"'[^']*'|\([^)]*\)|\d[\w.+-]*|\[.*", "", error)[:60]


def shrunk(seed, error, seconds):
    """The fewest actions found that fail alike: leave out half of them, a quarter, ... one."""
    until = time.monotonic() + seconds
    keep = [int(line.split()[0]) for line in run(seed)[1] if re.match(r"\d+ ", line)]
    size = len(keep)
    while size >= 1 and time.monotonic() < until:
        for at in range(0, len(keep), size):
            fewer = keep[:at] + keep[at + size :]
            _, _, other = run(seed, fewer)
            if other and kind(other) == kind(error):
                keep = fewer
                break
        else:
            size //= 2
        size = min(size, len(keep))
    return keep


def report(seed, error, seconds):
    keep = shrunk(seed, error, seconds)
    _, lines, again = run(seed, keep)
    print(f"\nseed {seed}: {(again or error)[2:]}")
    print(*(line for line in lines if "Extension" not in line and "fuzz.py" not in line), sep="\n  ")
    print(f"  repeat: {sys.executable} {sys.argv[0]} --once {seed} --keep {','.join(map(str, keep))}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--count", type=int, default=sys.maxsize, help="at most so many sequences")
    parser.add_argument("--seed", type=int, default=None, help="of the first sequence (the time)")
    parser.add_argument("--once", type=int, metavar="SEED", help="one sequence, in this process")
    parser.add_argument(
        "--keep", type=lambda text: [int(i) for i in text.split(",") if i], help="only these actions of it"
    )
    parser.add_argument("--without", type=lambda text: text.split(","), default=(), help="actions to leave out")
    parser.add_argument("--all", action="store_true", help="go on after a failure; each kind is shown once")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("collage").setLevel(logging.CRITICAL)
    for action in list(ACTIONS):
        if action.__name__ in args.without:
            del ACTIONS[action]
    if args.once is not None:
        sequence(args.once, args.keep, lambda line: print(line, flush=True))
        return 0
    first = int(time.time()) % 10**6 * 100 if args.seed is None else args.seed
    until, steps, done, failed = time.monotonic() + args.seconds, 0, 0, {}
    while done < args.count and time.monotonic() < until and (args.all or not failed):
        made, _, error = run(first + done)
        steps, done = steps + made, done + 1
        if error:
            failed[kind(error)] = failed.get(kind(error), 0) + 1
            if failed[kind(error)] == 1:
                report(first + done - 1, error, seconds=10)
    print(f"seeds {first} to {first + done - 1}: {done} sequences, {steps} steps, {sum(failed.values())} failures")
    for what, times in sorted(failed.items(), key=lambda x: -x[1]) if args.all else ():
        print(f"  {times} {what}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
