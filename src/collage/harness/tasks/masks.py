"""Tokens -> samples: fixed-length windows for causal models, and for masked ones by BERT's rule."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.utils.data import Dataset

from collage.harness.tasks.data import Tokens
from collage.rng import mix64

Sample: TypeAlias = "dict[str, torch.Tensor]"  # "input_ids" and "labels", each [seq_len] int64

IGNORED = -100  # the label that cross entropy leaves out
MASKED_SHARE = 0.15


def _windows(ids: torch.Tensor, seq_len: int) -> torch.Tensor:
    """[n] -> [n // seq_len, seq_len]: one after the other, without overlap; the rest at the end is left out."""
    count = len(ids) // seq_len
    if count == 0:
        raise ValueError(f"data: {len(ids)} tokens do not fill one window of {seq_len}; give more text")
    return ids[: count * seq_len].view(count, seq_len)


class CausalBlocks(Dataset[Sample]):
    """Windows for a causal model; transformers shifts the labels itself."""

    def __init__(self, ids: torch.Tensor, seq_len: int) -> None:
        self._windows = _windows(ids, seq_len)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Sample:
        window = self._windows[index]
        return {"input_ids": window, "labels": window}


class MaskedBlocks(Dataset[Sample]):
    """Windows for a masked model, by BERT's rule: 15 % of the tokens are to be predicted (rounded, at least one); of
    these 80 % become the mask token, 10 % an arbitrary token, 10 % stay.

    The mask is a function of (seed, epoch, index) and nothing else, so an interrupted run sees it again. `set_epoch`
    must be called before each epoch, unless `fixed`: then, as validation wants it, every epoch has the same masks.
    """

    def __init__(self, ids: torch.Tensor, seq_len: int, tokens: Tokens, seed: int = 0, *, fixed: bool = False) -> None:
        self._windows = _windows(ids, seq_len)
        self._mask_id = tokens.require_mask()
        self._ordinary_ids = tokens.ordinary_ids
        self._count = max(1, round(MASKED_SHARE * seq_len))
        self._seed = seed
        self._fixed = fixed
        # Shared memory: workers that outlive an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.untyped_storage().share_memory_()

    def set_epoch(self, epoch: int) -> None:
        if not self._fixed:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Sample:
        window = self._windows[index]
        bits = torch.Generator().manual_seed(_mix(self._seed, int(self._epoch), index))  # it uses the low 32 bits
        chosen = torch.rand(len(window), generator=bits).argsort(stable=True)[: self._count]
        original = window[chosen]
        arbitrary = torch.randint(len(self._ordinary_ids), (self._count,), generator=bits)
        fate = torch.rand(self._count, generator=bits)
        shown = torch.where(fate < 0.9, self._ordinary_ids[arbitrary], original)
        shown = shown.masked_fill(fate < 0.8, self._mask_id)
        return {
            "input_ids": window.index_put((chosen,), shown),
            "labels": torch.full_like(window, IGNORED).index_put((chosen,), original),
        }


def _mix(*values: int) -> int:
    """A stable 64-bit hash: SplitMix64 (Steele, Lea and Flood 2014), folded over the values."""
    state = 0
    for value in values:
        state = mix64(state + value)
    return state
