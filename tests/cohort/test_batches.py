"""The cohort's batches are those that each client would draw alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.cohort.batches import CohortBatches
from fedmp.data import Rows
from fedmp.data.order import one_pass


@settings(max_examples=40, deadline=None)
@given(
    clients=st.lists(st.tuples(st.integers(1, 23), st.integers(1, 9)), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
    is_small=st.booleans(),
    data=st.data(),
)
def test_each_client_draws_its_own_batches(
    clients: list[tuple[int, int]], batch_size: int, is_small: bool, data: st.DataObject
) -> None:
    clients.sort(key=lambda pair: -pair[1])
    names = [f"c{place}" for place in range(len(clients))]
    rows = [torch.arange(count) + 100 * place for place, (count, _) in enumerate(clients)]
    spare = torch.arange(7)  # of somebody who is not there
    held = Rows(torch.cat([spare, *rows]), [7, *map(len, rows)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmp.cohort.batches._DRAWN_AT_ONCE", 1 << 16 if is_small else 0)
        cohort = CohortBatches(
            names,
            held,
            np.arange(1, 1 + len(rows)),
            [n for _, n in clients],
            batch_size=batch_size,
            seed=3,
            round=2,
        )
    first = data.draw(st.integers(0, len(clients) - 1))
    stop = data.draw(st.integers(first + 1, len(clients)))
    drawn = cohort.chunk(first, stop)
    for place, (count, num_batches) in enumerate(clients[first:stop]):
        batches: list[torch.Tensor] = []
        epoch = 0
        while len(batches) < num_batches:
            order = one_pass(count, seed=3, client=names[first + place], round=2, epoch=epoch)
            batches += [rows[first + place][part] for part in order.split(batch_size)]
            epoch += 1
        for batch, expected in enumerate(batches[:num_batches]):
            assert drawn.sizes[batch][place] == len(expected)
            actual = drawn.rows[batch, place]
            assert torch.equal(actual[: len(expected)], expected)
            assert bool((actual[len(expected) :] == expected[0]).all())
        assert all(sizes[place] == 0 for sizes in drawn.sizes[num_batches:])
