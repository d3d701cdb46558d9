"""Replayed steps train as the model's own Python does, and models that a tape would miss something of have none."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmp.cohort import ChunkWork, Objective, RoundStart, flat_layout, own_statistics
from fedmp.cohort.batches import draw_batches
from fedmp.cohort.chunk import ChunkTrainer
from fedmp.cohort.module import StackedModule
from fedmp.cohort.optimizers import SGD, Adam, FlatOptimizer
from fedmp.data import Dataset
from fedmp.learning_rate import Constant
from fedmp.tasks import CrossEntropy

CLIENTS, ROUNDS = 3, 6


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens)))


class Masked(nn.Module):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.rand(100, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask[: x.shape[-2], : x.shape[-1]]


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def chunk_trainer(
    model: nn.Module, data: Dataset, optimizer: FlatOptimizer, *, replays: bool, **changes: object
) -> ChunkTrainer:
    work = ChunkWork(
        optimizer=optimizer,
        objective=Objective(CrossEntropy()),
        dataset=data,
        learning_rate=Constant(),
        num_rounds=ROUNDS,
        max_gradient_norm=None,
        accumulate_batches=1,
        num_microbatches=1,
        pads=not own_statistics(model),
        replays=replays,
    )
    work = replace(work, **changes)
    module = StackedModule(model, flat_layout(model), CLIENTS, optimizer.num_buffers)
    return ChunkTrainer(module, work, threading.Event())


def after_rounds(trainer: ChunkTrainer, model: nn.Module, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Weights, statistics and reports after some rounds."""
    start = RoundStart(
        parameters=torch.cat([p.detach().flatten() for p in model.parameters()]),
        statistics={name: b.clone() for name, b in own_statistics(model).items()},
    )
    trainer.module.load(start.parameters, start.statistics, CLIENTS)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [torch.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    found = []
    for round in range(1, ROUNDS + 1):
        batches = draw_batches(
            ["a", "b", "c"], rows, [-(-size // 4) for size in sizes], batch_size=4, seed=0, round=round
        )
        told = trainer.train(batches, start, round=round)
        found += [told.loss_sums, told.weights, told.num_correct]
    return [
        *found,
        trainer.module.parameters.rows(CLIENTS),
        *(b.clone() for b in trainer.module.buffers.values()),
    ]


def of_images(num_samples: int) -> Dataset:
    return Dataset(
        torch.randn(num_samples, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (num_samples,))
    )


def of_words(num_samples: int) -> Dataset:
    return Dataset(torch.randint(0, 10, (num_samples, 5)), torch.randint(0, 10, (num_samples, 5)))


@pytest.mark.parametrize(
    ("model", "data", "optimizer", "changes"),
    [
        (images(nn.ReLU()), of_images, SGD(lr=0.1), {}),
        (images(nn.BatchNorm2d(4), nn.GELU()), of_images, SGD(lr=0.1, momentum=0.9), {}),
        (images(nn.GroupNorm(2, 4)), of_images, Adam(lr=0.01), {"max_gradient_norm": 0.5}),
        (images(nn.Tanh(), Masked()), of_images, SGD(lr=0.1), {"accumulate_batches": 2}),
        (Words(), of_words, Adam(lr=0.01, decoupled=True, weight_decay=0.1), {}),
    ],
    ids=["convolution", "batch norm", "clipped", "accumulated", "transformer"],
)
@pytest.mark.parametrize("sizes", [(12, 12, 12), (11, 8, 3)], ids=["alike", "ragged"])
def test_replays_train_as_the_models_python_does(
    model: nn.Module,
    data: object,
    optimizer: FlatOptimizer,
    changes: dict[str, object],
    sizes: tuple[int, ...],
) -> None:
    model = model.double()
    samples = data(sum(sizes))  # type: ignore[operator]
    plain = chunk_trainer(model, samples, optimizer, replays=False, **changes)
    replayed = chunk_trainer(model, samples, optimizer, replays=True, **changes)
    expected = after_rounds(plain, model, sizes)
    found = after_rounds(replayed, model, sizes)
    assert replayed.refusal == ""
    assert replayed.num_replayed > 0
    assert plain.num_replayed == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Counting(nn.Module):
    """Does something else from its tenth pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return x if self.passes < 10 else x * 0.5


class Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(1)
        return x / len(self.seen)


class Skipping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.5 else x * 0.5


class Hooked(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, given, result: result * 0.5)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Counting, "something besides tensors"),
        (Listing, "something besides tensors"),
        (Skipping, "something besides tensors"),
        (Hooked, "hooks"),
    ],
)
def test_a_forward_with_a_state_of_its_own_runs_each_time(layer: type[nn.Module], reason: str) -> None:
    found = []
    for replays in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        model = images(layer()).double()
        trainer = chunk_trainer(model, of_images(36), SGD(lr=0.1), replays=replays)
        found.append(after_rounds(trainer, model, (12, 12, 12)))
        assert trainer.num_replayed == 0
    assert reason in trainer.refusal
    assert all(map(torch.equal, *found))


def test_passes_that_do_not_come_again_are_not_recorded() -> None:
    model = images(nn.ReLU()).double()
    trainer = chunk_trainer(model, of_images(36), SGD(lr=0.1), replays=True)
    after_rounds(trainer, model, (3, 2, 1))  # one batch a round
    assert 0 < trainer.num_replayed < ROUNDS - 2
