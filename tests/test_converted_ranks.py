"""Sharded states of one strategy loaded under another: each rank converts its part, and all have what one would."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_as_alone, launch, perform
from test_dcp import made, train
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

PAIRS = "collage-plus:fp32-master fp32-master:collage-8bit collage-8bit:collage-exact"


def from_whole(pairs: str) -> None:
    """The state of one process, loaded on all; then a state of these ranks loaded again, under the third strategy."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    whole = StateDictOptions(full_state_dict=True)
    for pair in pairs.split():
        saved, strategy = pair.split(":")
        alone, opt = made(saved, sharded=False)
        train(alone, opt, 0, 2)
        there, theirs = made(strategy, sharded=False)
        there.load_state_dict(alone.state_dict())
        theirs.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)
        ours, own = made(strategy)
        set_model_state_dict(ours, alone.state_dict(), options=whole)
        own.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)
        assert_same_as_alone(pair, ours, own, there, theirs)
        back, last = made(saved)
        set_model_state_dict(back, get_model_state_dict(ours, options=whole), options=whole)
        last.load_state_dict(copy.deepcopy(own.state_dict()), convert=True)
        again, other = made(saved, sharded=False)
        again.load_state_dict(there.state_dict())
        other.load_state_dict(copy.deepcopy(theirs.state_dict()), convert=True)
        assert_same_as_alone(f"{pair} and back", back, last, again, other)
        train(back, last, 2, 3)
    refused()


def refused() -> None:
    """What one rank refuses, all do: here the first one's weights are not those of the state."""
    alone, opt = made("collage-plus", sharded=False)
    train(alone, opt, 0, 2)
    ours, own = made("fp32-master", seed=0)
    with torch.no_grad():
        for p in ours.parameters():
            p.to_local().mul_(2.0**-12 if dist.get_rank() == 0 else 1.0)
    with pytest.raises(ValueError, match=r"load its weights first|this rank.s part of the state"):
        own.load_state_dict(copy.deepcopy(opt.state_dict()), convert=True)
    assert not own.state


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_rank_converts_its_part_and_what_one_refuses_all_do(world):
    launch(__file__, world, "whole", PAIRS)


if __name__ == "__main__":
    sys.path.insert(0, "tests")
    perform({"whole": from_whole})
