"""When a round closes, by a strategy's fields."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from fedmp.coordinator import Opening
from fedmp.engine.arrivals import predict_arrivals
from fedmp.errors import RoundError
from fedmp.strategy import Closing, FedAvg, FedBuff, FedDyn, Scaffold, StreamingDiLoCo

ORDER = ("a", "b", "c", "d")
TIMES = {"a": 4.0, "b": 1.0, "c": 3.0, "d": 2.0}


def closing(**fields: object) -> Closing:
    return FedAvg(**fields).closing(4)


def arrivals(rules: Closing, cohort: tuple[str, ...] = ORDER, **options: object) -> tuple[object, float]:
    opening = Opening(5, cohort, rules, **options)
    result = predict_arrivals(opening, place=ORDER.index, left_s={"a": 1.5}, finish_s=TIMES.__getitem__)
    return result.counted, result.duration_s


@pytest.mark.parametrize(
    ("fields", "num_clients", "numbers"),
    [
        ({}, 4, (4, 4, 4)),
        ({"fraction": 0.1}, 100, (10, 10, 10)),
        ({"fraction": 0.1, "over_selection": 0.3}, 100, (13, 10, 10)),
        ({"fraction": 0.1, "over_selection": 0.31, "min_clients": 3}, 100, (14, 10, 3)),
        ({"over_selection": 0.3}, 10, (10, 10, 10)),
        ({"fraction": 0.001}, 10, (1, 1, 1)),
        ({"min_clients": 50}, 10, (10, 10, 10)),
    ],
)
def test_so_many_begin_are_wanted_and_are_enough(
    fields: dict[str, float], num_clients: int, numbers: tuple[int, int, int]
) -> None:
    rules = FedAvg(**fields).closing(num_clients)
    assert (rules.num_training, rules.wanted, rules.minimum) == numbers


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"buffer_size": 2}, (7, 2, 2)),
        ({"buffer_size": 2, "concurrency": 3}, (3, 2, 2)),
        ({"buffer_size": 20}, (7, 7, 7)),
    ],
)
def test_a_buffer_is_full_with_k_updates_while_others_train(
    fields: dict[str, int], numbers: tuple[int, int, int]
) -> None:
    rules = FedBuff(**fields).closing(7)
    assert (rules.num_training, rules.wanted, rules.minimum) == numbers
    assert rules.refills
    assert rules.max_staleness == 10


def test_a_stale_update_is_discounted() -> None:
    assert [FedAvg().closing(1).discount(s) for s in (0, 3)] == [1.0, 0.5]
    assert FedAvg(staleness_exponent=1).closing(1).discount(3) == 0.25
    assert FedAvg(staleness="constant").closing(1).discount(3) == 1.0


def test_late_updates_are_discarded_unless_they_shall_count() -> None:
    assert closing().oldest(8) is None
    assert closing(late="stale", max_staleness=2).oldest(8) == 7  # late by 2 rounds in round 9


def test_a_deadline_wants_to_know_how_many_clients_are_enough() -> None:
    with pytest.raises(ValidationError, match=r"a deadline of 30 s changes nothing .* min_clients=NUMBER"):
        FedAvg(deadline_s=30)


@pytest.mark.parametrize("kind", [Scaffold, FedDyn, StreamingDiLoCo])
def test_strategies_that_need_updates_of_the_present_model_refuse_stale_ones(kind: type[FedAvg]) -> None:
    with pytest.raises(ValidationError, match=rf"late='stale' does not go with {kind.__name__}: .*'discard'"):
        kind(late="stale")
    assert kind(over_selection=0.3).closing(10).max_staleness is None


@pytest.mark.parametrize("field", ["fraction", "over_selection"])
def test_fedbuff_says_what_it_has_instead_of_cohorts(field: str) -> None:
    with pytest.raises(
        ValidationError, match=rf"{field} is for strategies with cohorts; .* buffer_size=NUMBER"
    ):
        FedBuff(**{field: 0.5})
    with pytest.raises(ValidationError, match="late"):
        FedBuff(late="discard")


def test_a_round_takes_all_and_ends_with_the_slowest() -> None:
    assert arrivals(closing()) == (("b", "d", "c", "a"), 4.0)


def test_with_over_selection_the_fastest_count() -> None:
    assert arrivals(closing(fraction=0.5, over_selection=1.0)) == (("b", "d"), 2.0)


def test_at_the_deadline_the_minimum_is_enough() -> None:
    assert arrivals(closing(min_clients=1, deadline_s=2.5)) == (("b", "d"), 2.5)


def test_without_the_minimum_a_round_outlasts_its_deadline() -> None:
    assert arrivals(closing(min_clients=3, deadline_s=0.5)) == (("b", "d", "c"), 3.0)


def test_a_late_client_arrives_after_the_seconds_that_it_still_needs() -> None:
    rules = closing(late="stale").among(3)
    assert arrivals(rules, ("c", "d"), late={"a": 4}) == (("a", "d", "c"), 3.0)


def test_of_two_that_finish_together_the_first_in_client_order_counts() -> None:
    opening = Opening(1, ("d", "a"), closing(fraction=0.25, over_selection=1.0))
    result = predict_arrivals(opening, place=ORDER.index, left_s={}, finish_s=lambda client: 1.0)
    assert (result.counted, result.left_s) == (("a",), {"d": 0.0})


def test_a_spare_client_begins_when_another_is_done() -> None:
    rules = FedBuff(buffer_size=3, concurrency=1).closing(4)
    opening = Opening(1, ("b",), rules, spare=("c", "d", "a"))
    result = predict_arrivals(opening, place=ORDER.index, left_s={}, finish_s=TIMES.__getitem__)
    assert (result.counted, result.duration_s) == (("b", "c", "d"), 6.0)
    assert result.left_s == {}


def test_clients_that_never_finish_are_left_out_if_the_others_are_enough() -> None:
    times = {**TIMES, "a": math.inf}
    opening = Opening(1, ORDER, closing(min_clients=3))
    result = predict_arrivals(opening, place=ORDER.index, left_s={}, finish_s=times.__getitem__)
    assert result.counted == ("b", "d", "c")
    with pytest.raises(RoundError, match=r"3 of 4 clients ever finish round 1, 4 are needed; the others: a"):
        predict_arrivals(
            Opening(1, ORDER, closing()), place=ORDER.index, left_s={}, finish_s=times.__getitem__
        )
