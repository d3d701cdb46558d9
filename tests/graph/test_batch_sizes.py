"""A batch size for which the trace would be wrong is refused; every other one works."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedmp.errors import TraceError
from fedmp.graph import trace
from fedmp.stages import run_stages, split_graph
from tests.stages.oracle import check_split
from tests.support.models import even_cuts, plan_at


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Fixed(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) + torch.arange(3.0)[:, None]


class Even(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) * 2 if x.shape[0] % 2 == 0 else self.run(x)


class SingleIsSpecial(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) * 3 if x.shape[0] == 1 else self.run(x)


class Large(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) - 1 if x.size(0) > 4 else self.run(x)


class Counts(Layers):
    """`len` is a plain number, which fixes the batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) / len(x)


class Multiples(Layers):
    """Two rows of the second input for each row of the first."""

    def forward(self, x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return self.run(x) + self.run(pairs).view(x.shape[0], 2, 4).sum(1)


class Table(Layers):
    """The second input has as many rows as the example batch, but is no batch."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.run(x) @ table


def stages_of(model: nn.Module, batch: int) -> Any:
    graph = trace(model, (torch.zeros(batch, 4),))
    names = tuple(layer.name for layer in graph.layers)
    return split_graph(graph, plan_at(names, even_cuts(len(names), 2)), copy.deepcopy(model))


@pytest.mark.parametrize(
    ("model", "traced", "right", "wrong"),
    [
        (Fixed(), 3, [3], [1, 2, 4]),
        (Counts(), 3, [3], [1, 2, 4]),
        (Even(), 4, [2, 4, 8], [1, 3]),
        (SingleIsSpecial(), 3, [2, 3, 7], [1]),
        (SingleIsSpecial(), 1, [2, 3], [1]),
        (Large(), 6, [5, 6, 9], [1, 4]),
        (Large(), 2, [1, 2, 4], [5]),
    ],
)
def test_a_batch_is_right_or_refused(
    model: nn.Module, traced: int, right: list[int], wrong: list[int]
) -> None:
    stages = stages_of(model, traced)
    for batch in right:
        x = torch.randn(batch, 4)
        assert torch.equal(run_stages(stages, x), model(x))
    for batch in wrong:
        with pytest.raises(ValueError, match=rf"traced with.*\({batch}, 4\)"):
            run_stages(stages, torch.randn(batch, 4))


def test_another_shape_names_both() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*not \[\(3, 5\)\]"):
        run_stages(stages_of(SingleIsSpecial(), 3), torch.zeros(3, 5))


def test_several_rows_a_sample() -> None:
    def inputs(batch: int) -> Any:
        generator = torch.Generator().manual_seed(batch)
        return tuple(
            torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (batch, 2 * batch)
        ), {}

    check_split(Multiples().double(), inputs, batches=(1, 3, 5), tolerance=1e-14)


def test_rows_that_only_look_like_a_batch() -> None:
    def inputs(batch: int) -> Any:
        generator = torch.Generator().manual_seed(batch)
        return tuple(
            torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (batch, 4)
        ), {}

    for traced in (2, 4):
        check_split(Table().double(), inputs, traced_batch=traced, batches=(traced,), tolerance=1e-14)
    check_split(Table().double(), inputs, traced_batch=2, batches=(1, 3, 5), tolerance=1e-14)


def test_inputs_without_a_batch_are_refused() -> None:
    with pytest.raises(TraceError, match="at least one example tensor with a batch dim"):
        trace(SingleIsSpecial(), (torch.tensor(1.0),))
