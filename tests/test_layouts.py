"""What ranks measure and export of the weights that they share is what one process does, however these lie."""

import sys
import warnings

import exports
import pytest
import reports
import torch.distributed as dist
from ranks import launch

from collage.strategies import STRATEGIES


def rank(steps: str, *strategies: str) -> None:
    warnings.simplefilter("ignore")  # of edits
    dist.init_process_group("gloo")
    for strategy in strategies:
        reports.compare(strategy, int(steps))
        exports.compare(strategy)
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "strategies"), [(2, ["fp32-master"]), (4, ["collage-plus-sr", "collage-8bit"])])
def test_ranks_report_and_export_what_one_process_does(world, strategies):
    launch(__file__, world, "6", *strategies)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_report_and_export_what_one_process_does_under_every_strategy(strategy, world):
    launch(__file__, world, "50", strategy)


if __name__ == "__main__":
    rank(*sys.argv[1:])
