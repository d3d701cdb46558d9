"""Aggregators are chosen by name on the command line."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from fedmp.aggregate import Aggregator
from fedmp.config import config_dir, load_config

CHOICES = sorted(path.stem for path in (config_dir() / "aggregator").glob("*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_the_config_is_an_aggregator(choice: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base=None):
        job = load_config(compose("config", [f"aggregator={choice}"])).job()
    assert isinstance(job.aggregator, Aggregator)


def test_all_aggregators_can_be_chosen() -> None:
    import fedmp.aggregate

    classes = set(fedmp.aggregate.__all__) - {"Aggregator", "gives_views"}
    assert len(CHOICES) == len(classes)
