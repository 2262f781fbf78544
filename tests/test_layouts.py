"""What ranks measure and export of the weights that they share is what one process does, however these lie."""

import sys
import warnings

import exports
import pytest
import reports
from ranks import as_rank, launch

from collage.strategies import STRATEGIES

QUICK = (2, ("collage-8bit",)), (4, ("collage-plus-sr",))
SOME = [tuple(STRATEGIES)[k : k + 4] for k in range(0, len(STRATEGIES), 4)]


def rank(steps: str, *strategies: str) -> None:
    warnings.simplefilter("ignore")  # of edits
    for strategy in strategies:
        reports.compare(strategy, int(steps))
        exports.compare(strategy)


@pytest.mark.parametrize(("world", "strategies"), QUICK)
def test_ranks_report_and_export_what_one_process_does(world, strategies):
    launch(__file__, world, str(reports.SHORT), *strategies)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("strategies", SOME)
def test_ranks_report_and_export_what_one_process_does_under_every_strategy(strategies, world):
    launch(__file__, world, "50", *strategies, seconds=1200)


if __name__ == "__main__":
    as_rank(rank, *sys.argv[1:])
