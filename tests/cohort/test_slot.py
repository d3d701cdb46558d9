"""Steps made within the backward, and sums over clients, end where each client would have ended alone."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedmp.cohort import ChunkWork, Objective, RoundStart, flat_layout
from fedmp.cohort.batches import CohortBatches
from fedmp.cohort.chunk import ChunkTrainer
from fedmp.cohort.module import StackedModule
from fedmp.cohort.optimizers import SGD
from fedmp.cohort.slot import Arrived
from fedmp.data import Dataset, Rows
from fedmp.learning_rate import Constant
from fedmp.tasks import CrossEntropy

SIZES, BATCH, RATE = (12, 12, 12), 4, 0.3
SHARES = (0.5, 0.2, 0.3)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Twice(Plain):
    """A layer is gone through twice, so that its weights must not move in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.first(x).relu()))


class Looked(Plain):
    """Weights are read beside their layer, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + self.second.weight.square().sum()


class Named(Plain):
    """Weights are named, as an argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(F.linear(x, weight=self.first.weight)).relu())


class Transposed(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).tanh() @ self.second.weight.t()


class Recomputed(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False).relu())


class Borrowed(nn.Module):
    """Weights of one layer, a bias that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 3), nn.Parameter(torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias * self.scale)


class Images(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, **{"kernel_size": 3, **options})
        self.head = nn.LazyLinear(3)
        self(torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x.view(-1, 1, 2, 4).repeat(1, 1, 3, 2)).relu()).relu()
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Again(Images):
    """A convolution is gone through twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x.view(-1, 1, 2, 4).repeat(1, 1, 3, 2)).relu()
        return self.head(F.max_pool2d(self.two(self.two(x).relu()), 2).flatten(1))


MODELS = {
    **{
        kind.__name__: kind
        for kind in (Plain, Twice, Looked, Named, Transposed, Recomputed, Borrowed, Images)
    },
    "Again": lambda: Again(padding=1),
    "Again, pointwise": lambda: Again(kernel_size=1),  # whose kernels are in order as they are
    "Strided": lambda: Images(stride=2, padding=1, groups=2, bias=False),
    "Same": lambda: Images(padding="same", dilation=2),
    "Uneven": lambda: Images(padding=(0, 1), dilation=(2, 1)),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().double()


def samples() -> Dataset:
    torch.manual_seed(2)
    return Dataset(torch.randn(sum(SIZES), 8).double(), torch.randint(0, 3, (sum(SIZES),)))


def batches() -> CohortBatches:
    rows = Rows(torch.arange(sum(SIZES)), SIZES)
    return CohortBatches("abc", rows, np.arange(3), [3, 3, 3], batch_size=BATCH, seed=0, round=1)


def trainer_of(model: nn.Module, own: frozenset[str] = frozenset()) -> ChunkTrainer:
    work = ChunkWork(
        optimizer=SGD(lr=RATE),
        objective=Objective(CrossEntropy()),
        dataset=samples(),
        learning_rate=Constant(),
        num_rounds=1,
        max_gradient_norm=None,
        accumulate_batches=1,
        num_microbatches=1,
        pads=True,
        own=own,
        replays=False,
    )
    return ChunkTrainer(StackedModule(model, flat_layout(model), 3, 0), work, threading.Event())


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alone(model: nn.Module) -> torch.Tensor:
    """[3, P] each client's weights, by torch's own optimizer."""
    data, drawn, found = samples(), batches().chunk(0, 3), []
    for client in range(3):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=RATE)
        for rows in drawn.rows[:, client]:
            optimizer.zero_grad()
            F.cross_entropy(own(data.input_batch(rows)), data.target_batch(rows)).backward()
            optimizer.step()
        found.append(flat(own))
    return torch.stack(found)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_is_that_of_each_client_alone(name: str, keep: bool) -> None:
    model = model_of(name)
    trainer, shares = trainer_of(model), torch.tensor(SHARES).double()
    told = trainer.train(batches().chunk(0, 3), shares, RoundStart(flat(model), {}), round=1, keep=keep)
    expected = alone(model)
    torch.testing.assert_close(told.total, shares @ expected, rtol=1e-10, atol=1e-10)
    if keep:
        torch.testing.assert_close(trainer.module.parameters.rows(3), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "arrived"),
    [
        ("Plain", {"first.weight": Arrived.SUM, "first.bias": Arrived.STEP, "second.weight": Arrived.SUM}),
        ("Twice", {"first.weight": Arrived.GRADIENT, "second.weight": Arrived.SUM}),
        ("Looked", {"first.weight": Arrived.SUM, "second.weight": Arrived.GRADIENT}),
        ("Images", {"one.weight": Arrived.STEP, "head.weight": Arrived.SUM}),
    ],
)
def test_weights_move_in_the_backward_only_where_nobody_else_reads_them(
    name: str, arrived: dict[str, Arrived]
) -> None:
    model = model_of(name)
    trainer = trainer_of(model)
    shares = torch.tensor(SHARES).double()
    trainer.train(batches().chunk(0, 3), shares, RoundStart(flat(model), {}), round=1, keep=False)
    found = dict(zip(trainer.module.layout.names, trainer.module.arrived(0, 3), strict=True))
    assert {key: found[key] for key in arrived} == arrived


def test_what_stays_at_a_client_is_not_taken_for_everybodys() -> None:
    """Such parameters differ before the first step."""
    model = model_of("Plain")
    trainer = trainer_of(model, own=frozenset({"second.weight"}))
    states = [{"own/second.weight": torch.full((3, 8), float(k)).double()} for k in range(3)]
    shares, start = torch.tensor(SHARES).double(), RoundStart(flat(model), {})
    trainer.train(batches().chunk(0, 3), shares, start, round=1, keep=False, states=states)
    found = trainer.module.parameters.rows(3)
    for client, state in enumerate(states):
        own = copy.deepcopy(model)
        own.second.weight.data.copy_(state["own/second.weight"])
        torch.testing.assert_close(found[client], alone(own)[client], rtol=1e-10, atol=1e-10)
