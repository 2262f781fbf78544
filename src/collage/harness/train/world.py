"""The processes that train together, as torchrun started them; without it, this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def size() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return size() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def joined() -> Iterator[None]:
    """They can reach each other, until the end."""
    if size() == 1:
        yield
        return
    was_there = torch.distributed.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available())
    failed = True
    try:
        yield
        failed = False
    finally:  # after an error others may still be in a collective: NCCL would wait for them; gloo's threads have to end
        if not was_there and not (failed and torch.distributed.get_backend() == "nccl"):
            state.destroy_process_group()


def first_does(act: Callable[[], T]) -> T:
    """What `act` returns on the first process, on all. What it raises there ends the others in silence."""
    if size() == 1:
        return act()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = act()
        except Exception as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1] if is_first() else SystemExit(2)
    result: T = told[0]
    return result


def each_does(act: Callable[[], T]) -> T:
    """What `act` returns here. The first process does it first, and what it raises there ends the others in silence."""
    own: list[T] = []
    first_does(lambda: own.append(act()))
    return own[0] if own else act()


def wait() -> None:
    """Until all are here."""
    if size() > 1:
        PartialState().wait_for_everyone()
