"""Sharing a link: fair at every moment, never idle, and more of it is never slower."""

from __future__ import annotations

from itertools import starmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.clock import Clock, SharedLink, fair_rates
from fedmp.topology import Link
from tests.clock.samples import arrivals, work

positive = st.floats(0.1, 100.0)
transfers = st.lists(st.tuples(st.floats(0.0, 5.0), positive, positive), min_size=1, max_size=7)


def ends(flows: list[tuple[float, float, float]], bandwidth: float | None) -> list[float]:
    """When transfers of (start, bytes, own bandwidth) end."""
    link: SharedLink[int] = SharedLink(bandwidth)
    for key, (start_s, num_bytes, own) in enumerate(flows):
        link.add(key, start_s, num_bytes, Link(own, 0.0))
    done: dict[int, float] = {}
    link.run(done.__setitem__)
    return [done[key] for key in range(len(flows))]


@given(st.lists(positive, min_size=1, max_size=9), positive)
def test_rates_are_fair_and_use_all_that_can_be_used(caps: list[float], capacity: float) -> None:
    rates = fair_rates(np.asarray(caps), capacity)
    assert rates.sum() == pytest.approx(min(sum(caps), capacity))
    cut_off = [rate for rate, cap in zip(rates, caps, strict=True) if rate < cap * (1 - 1e-9)]
    assert all(rate >= max(rates) * (1 - 1e-9) for rate in cut_off)


@given(transfers, positive, st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(
    flows: list[tuple[float, float, float]], bandwidth: float, more: float
) -> None:
    before, after = ends(flows, bandwidth), ends(flows, bandwidth * more)
    assert all(late >= early - 1e-6 for late, early in zip(before, after, strict=True))


@given(transfers, positive)
def test_a_shared_link_is_never_faster_than_one_alone_and_never_idle(
    flows: list[tuple[float, float, float]], bandwidth: float
) -> None:
    shared, alone = ends(flows, bandwidth), ends(flows, None)
    assert all(late >= early - 1e-6 for late, early in zip(shared, alone, strict=True))
    first = min(start for start, _, _ in flows)
    slowest = min(bandwidth, *(own for _, _, own in flows))
    most_s = max(start for start, _, _ in flows) + sum(size for _, size, _ in flows) / slowest
    assert first <= max(shared) <= most_s + 1e-6


@settings(max_examples=15)
@given(transfers, st.floats(5.0, 100.0))
def test_sharing_agrees_with_a_walk_in_small_steps(
    flows: list[tuple[float, float, float]], bandwidth: float
) -> None:
    left = np.asarray([size for _, size, _ in flows])
    starts, own = (np.asarray([flow[index] for flow in flows]) for index in (0, 2))
    expected, now_s, step_s = [float("nan")] * len(flows), 0.0, 0.01
    for _ in range(1500):
        active = (starts <= now_s) & (left > 0)
        if active.any():
            left[active] -= step_s * fair_rates(own[active], bandwidth)
        now_s += step_s
        for key in np.flatnonzero((left <= 0) & np.isnan(expected)):
            expected[key] = now_s
    for walked_s, computed_s in zip(expected, ends(flows, bandwidth), strict=True):
        if not np.isnan(walked_s):
            assert walked_s == pytest.approx(computed_s, abs=0.01 * (2 + len(flows)) * 3, rel=0.05)


@given(st.lists(st.tuples(positive, positive, positive), min_size=1, max_size=5), st.floats(1.0, 10.0))
def test_a_faster_line_or_a_faster_device_is_never_slower(
    clients: list[tuple[float, float, float]], more: float
) -> None:
    def client(
        index: int, size: float, bandwidth: float, step_s: float, factor: float = 1.0, speed: float = 1.0
    ):
        uplink = Link(bandwidth * factor, 0.1)
        return work(f"c{index}", down=(size,), up=(size,), uplink=uplink, step_s=step_s / speed)

    numbered = [(index, *each) for index, each in enumerate(clients)]
    before = arrivals(*starmap(client, numbered))
    for change in ({"factor": more}, {"speed": more}):
        after = arrivals(*(client(*each, **change) for each in numbered))
        assert all(late >= early - 1e-9 for late, early in zip(before, after, strict=True))


def test_a_thousand_clients_are_timed_quickly_enough_to_be_free() -> None:
    works = [work(f"c{index}", down=(100.0 + index,), num_batches=1 + index % 7) for index in range(1000)]
    shared = arrivals(*works, clock=Clock(server_bandwidth_bytes_per_s=1e4))
    assert len(shared) == 1000
    assert min(shared) > 12.0
