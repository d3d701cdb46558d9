"""A job whose rounds its aggregator could not combine is refused before it begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedmp import Job
from fedmp.aggregate import Aggregator, Bulyan, Krum, MultiKrum, TrimmedMean, WeightedMean
from fedmp.errors import ConfigError
from fedmp.strategy import FedAvg, FedBuff
from tests.support.jobs import TINY_MLP, images, topology

TEN = Job(model=TINY_MLP, topology=topology(*[1] * 10), data=images(20))


@pytest.mark.parametrize(
    ("aggregator", "strategy", "message"),
    [
        (
            Krum(num_byzantine=4),
            FedAvg(),
            r"close with 10 clients' .* 2 x 4 \+ 3 = 11 clients a round, not 10",
        ),
        (Krum(), FedAvg(fraction=0.2), r"close with 2 clients' updates .* = 3 clients a round, not 2"),
        (
            Krum(),
            FedAvg(fraction=0.2, over_selection=1.0),
            r"close with 2 clients' .* 3 clients a round, not 2",
        ),
        (
            MultiKrum(num_byzantine=3),
            FedAvg(min_clients=5),
            r"with 5 to 10 .* = 9 clients a round, not 5; .* set strategy.min_clients=9",
        ),
        (MultiKrum(num_byzantine=2, num_selected=9), FedAvg(), r"select at most 8, not num_selected=9"),
        (Bulyan(num_byzantine=1), FedBuff(buffer_size=6), r"4 x 1 \+ 3 = 7 clients a round, not 6"),
        # 2 of 5 leave one, 3 of 6 leave none: the fewest are not always the worst
        (
            TrimmedMean(trim=0.4),
            FedAvg(min_clients=5),
            r"with 5 to 10 .* drops 3 of 6 .* strategy.min_clients=9",
        ),
    ],
    ids=repr,
)
def test_a_job_refuses_an_aggregator_that_some_round_would_be_too_small_for(
    aggregator: Aggregator, strategy: FedAvg, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TEN, aggregator=aggregator, strategy=strategy)


@pytest.mark.parametrize(
    ("aggregator", "strategy"),
    [
        (WeightedMean(), FedAvg(fraction=0.01)),
        (Krum(num_byzantine=3), FedAvg(fraction=0.9, over_selection=0.3)),
        (MultiKrum(num_byzantine=1), FedAvg(min_clients=5)),
        (Bulyan(), FedBuff(buffer_size=3)),
        (TrimmedMean(trim=0.2), FedAvg(min_clients=3)),
    ],
    ids=repr,
)
def test_a_job_takes_an_aggregator_that_every_round_is_large_enough_for(
    aggregator: Aggregator, strategy: FedAvg
) -> None:
    assert replace(TEN, aggregator=aggregator, strategy=strategy).aggregator == aggregator
