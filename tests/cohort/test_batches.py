"""The cohort's batches are those that each client would draw alone."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmp.cohort.batches import draw_batches
from fedmp.data import Rows
from fedmp.data.order import one_pass


@settings(max_examples=40, deadline=None)
@given(
    clients=st.lists(st.tuples(st.integers(1, 23), st.integers(1, 9)), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
)
def test_each_client_draws_its_own_batches(clients: list[tuple[int, int]], batch_size: int) -> None:
    clients.sort(key=lambda pair: -pair[1])
    names = [f"c{place}" for place in range(len(clients))]
    rows = [torch.arange(count) + 100 * place for place, (count, _) in enumerate(clients)]
    spare = torch.arange(7)  # of somebody who is not there
    held = Rows(torch.cat([spare, *rows]), [7, *map(len, rows)])
    drawn = draw_batches(
        names,
        held,
        np.arange(1, 1 + len(rows)),
        [n for _, n in clients],
        batch_size=batch_size,
        seed=3,
        round=2,
    )
    for place, (count, num_batches) in enumerate(clients):
        batches: list[torch.Tensor] = []
        epoch = 0
        while len(batches) < num_batches:
            order = one_pass(count, seed=3, client=names[place], round=2, epoch=epoch)
            batches += [rows[place][part] for part in order.split(batch_size)]
            epoch += 1
        for batch, expected in enumerate(batches[:num_batches]):
            assert drawn.sizes[batch][place] == len(expected)
            actual = drawn.rows[batch, place]
            assert torch.equal(actual[: len(expected)], expected)
            assert bool((actual[len(expected) :] == expected[0]).all())
        assert all(sizes[place] == 0 for sizes in drawn.sizes[num_batches:])
