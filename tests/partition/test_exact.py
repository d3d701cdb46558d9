"""`Exact` against brute force, and what it promises about bounds, kinds of devices and errors."""

from __future__ import annotations

import math

import pytest

from fedmp.errors import InfeasibleError
from fedmp.partition import Exact
from tests.partition.instances import brute_force, random_instance

# Both sides add the same numbers, in another order.
RELATIVE = 1e-9


def agree(seed: int) -> None:
    """`Exact` finds what brute force finds, for one random problem under each schedule."""
    instance = random_instance(seed)
    for schedule, allowed in (
        ("gpipe", ("gpipe",)),
        ("1f1b", ("1f1b", "1f1b-short")),
        ("1f1b-short", ("1f1b-short",)),
    ):
        best = brute_force(instance, allowed)
        try:
            plan = Exact(schedule=schedule).plan(
                instance.profile,
                instance.devices,
                instance.links,
                num_microbatches=instance.num_microbatches,
            )
        except InfeasibleError:
            assert math.isinf(best.step_s), f"seed {seed}, {schedule}: feasible with {best}"
            continue
        assert plan.step_s == pytest.approx(best.step_s, rel=RELATIVE), f"seed {seed}, {schedule}"
        assert plan.gap <= RELATIVE, f"seed {seed}, {schedule}: optimal, but not proved"


@pytest.mark.parametrize("seed", range(50))
def test_exact_agrees_with_brute_force(seed: int) -> None:
    agree(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50, 550))
def test_exact_agrees_with_brute_force_on_500_more(seed: int) -> None:
    agree(seed)
