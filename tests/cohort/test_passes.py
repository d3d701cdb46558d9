"""Replayed steps train as the model's own Python does, and models that a tape would miss something of have none."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmp.cohort import ChunkWork, Objective, RoundStart, flat_layout, own_statistics
from fedmp.cohort.batches import CohortBatches
from fedmp.cohort.chunk import ChunkTrainer
from fedmp.cohort.module import StackedModule
from fedmp.cohort.optimizers import SGD, Adam, FlatOptimizer
from fedmp.cohort.replays import Replays
from fedmp.data import Dataset, Rows
from fedmp.learning_rate import Constant
from fedmp.tasks import CrossEntropy, MeanLoss, Task

CLIENTS, ROUNDS = 3, 6


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens)))


@pytest.fixture(autouse=True)
def recorded_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are so small that hundreds of passes would not be worth it."""
    monkeypatch.setattr("fedmp.cohort.passes._WORTH_S", 1e-4)
    monkeypatch.setattr("fedmp.cohort.passes._TIMES", 1)
    monkeypatch.setattr("fedmp.cohort.chunk._WORTH_S", 1e-4)


@pytest.fixture(params=["passes", "rounds"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is recorded: each pass, or rounds as a whole."""
    if request.param == "passes":
        monkeypatch.setattr("fedmp.cohort.chunk._SHORT", 0)
    return str(request.param)


def tapes(trainer: ChunkTrainer, level: str = "passes") -> Replays:
    return trainer.rounds if level == "rounds" else trainer.passes.replays


class Masked(nn.Module):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.rand(100, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask[: x.shape[-2], : x.shape[-1]]


class Widened(nn.Module):
    """Double precision of whatever comes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


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


def after_rounds(trainer: ChunkTrainer, model: nn.Module, *cohorts: tuple[int, ...]) -> list[torch.Tensor]:
    """Weights, statistics and reports after some rounds, whose clients' samples take turns."""
    start = RoundStart(
        parameters=torch.cat([p.detach().flatten() for p in model.parameters()]),
        statistics={name: b.clone() for name, b in own_statistics(model).items()},
    )
    found = []
    for round in range(1, ROUNDS + 1):
        sizes = cohorts[round % len(cohorts)]
        rows, places = Rows(torch.arange(sum(sizes)), sizes), np.arange(3)
        batches = CohortBatches(
            ["a", "b", "c"],
            rows,
            places,
            [-(-size // 4) for size in sizes],
            batch_size=4,
            seed=0,
            round=round,
        ).chunk(0, 3)
        told = trainer.train(batches, torch.tensor([0.5, 0.2, 0.3]).double(), start, round=round)
        statistics = dict(zip(start.statistics, told.buffers, strict=True))
        found += [told.losses.clone(), told.figures.clone(), told.total.clone()]
        start = RoundStart(
            parameters=told.total.clone(),
            statistics={name: statistics[name].to(b.dtype) for name, b in start.statistics.items()},
        )
    return [
        *found,
        trainer.module.parameters.rows(CLIENTS),
        *(b.clone() for b in trainer.module.buffers.values()),
    ]


def of_images(num_samples: int) -> Dataset:
    return Dataset(
        torch.randn(num_samples, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (num_samples,))
    )


def of_pictures(num_samples: int) -> Dataset:
    """As they are published: bytes, to be scaled and normalised."""
    pixels = torch.randint(0, 256, (num_samples, 4, 4), dtype=torch.uint8)
    return Dataset(pixels, torch.randint(0, 3, (num_samples,)), mean=(0.3,), std=(0.2,))


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
        (nn.Sequential(Widened(), images(nn.ReLU())), of_pictures, SGD(lr=0.1), {}),
    ],
    ids=["convolution", "batch norm", "clipped", "accumulated", "transformer", "bytes"],
)
@pytest.mark.parametrize("sizes", [(12, 12, 12), (11, 8, 3)], ids=["alike", "ragged"])
def test_replays_train_as_the_models_python_does(
    model: nn.Module,
    data: object,
    optimizer: FlatOptimizer,
    changes: dict[str, object],
    sizes: tuple[int, ...],
    level: str,
) -> None:
    model = model.double()
    samples = data(sum(sizes))  # type: ignore[operator]
    plain = chunk_trainer(model, samples, optimizer, replays=False, **changes)
    replayed = chunk_trainer(model, samples, optimizer, replays=True, **changes)
    expected = after_rounds(plain, model, sizes)
    found = after_rounds(replayed, model, sizes)
    assert tapes(replayed, level).refusal == ""
    assert tapes(replayed, level).num_replayed > 0
    assert tapes(plain, level).num_replayed == 0
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


class OwnGenerator(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.generator.choice([0.5, 1.0, 2.0])


class OwnNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.full((1,), float(self.generator.normal()))


class Annealed(nn.Module):
    """Goes by an object that counts, some way down."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"schedule": [Schedule()]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.settings["schedule"][0].value()


class Schedule:
    def __init__(self) -> None:
        self.calls = 0

    def value(self) -> float:
        self.calls += 1
        return 1.0 if self.calls < 12 else 0.5


class OfTheClass(nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return x if self.calls % 24 < 12 else x * 0.5


class Literal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(0.5)


class Spaced(nn.Module):
    """vmap takes torch.linspace apart only while operations are recorded, and cannot run the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linspace(0.5, self.end, x.shape[-1])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Counting, "something besides tensors"),
        (Listing, "something besides tensors"),
        (Skipping, "something besides tensors"),
        (OwnGenerator, "something besides tensors"),
        (OwnNoise, "something besides tensors"),
        (Annealed, "something besides tensors"),
        (OfTheClass, "something besides tensors"),
        (Literal, "does not do the same"),
        (Spaced, "linspace cannot run"),
        (Hooked, "hooks"),
    ],
)
def test_a_forward_with_a_state_of_its_own_runs_each_time(
    layer: type[nn.Module], reason: str, level: str
) -> None:
    found = []
    for replays in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        OfTheClass.calls = 0
        model = images(layer()).double()
        trainer = chunk_trainer(model, of_images(36), SGD(lr=0.1), replays=replays)
        found.append(after_rounds(trainer, model, (12, 12, 12)))
        assert tapes(trainer, level).num_replayed == 0
    assert reason in tapes(trainer, level).refusal
    assert all(map(torch.equal, *found))


class CountingLoss(nn.Module):
    """A loss that is a module, and goes by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = nn.functional.cross_entropy(output, targets)
        return loss if self.calls < 12 else loss * 0.5


class CountedInPython(CrossEntropy):
    """Tells correct predictions by values that no operation shows."""

    def num_correct(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        return float(np.sum(output.detach().argmax(-1).numpy() == targets.numpy()))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MeanLoss(function=CountingLoss()), "something besides tensors"),
        (CountedInPython, "in Python"),
    ],
)
def test_a_task_with_a_state_of_its_own_runs_each_time(
    make: Callable[[], Task], reason: str, level: str
) -> None:
    found = []
    torch.manual_seed(0)
    model, data = images(nn.ReLU()).double(), of_images(36)
    for replays in (False, True):
        trainer = chunk_trainer(
            model, data, SGD(lr=0.1), replays=replays, objective=Objective(make()), pads=False
        )
        found.append(after_rounds(trainer, model, (12, 12, 12)))
        assert tapes(trainer, level).num_replayed == 0
    assert reason in tapes(trainer, level).refusal
    assert all(map(torch.equal, *found))


def squares(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets.unsqueeze(1)).square().mean()


class WeighedInPython(MeanLoss):
    """Tells its weights by values that no operation shows."""

    def weight(self, targets: torch.Tensor) -> float:
        return float(np.size(targets.numpy()))


@pytest.mark.parametrize("kind", [MeanLoss, WeighedInPython])
def test_a_loss_of_ones_own_is_replayed(kind: type[MeanLoss], level: str) -> None:
    found = []
    torch.manual_seed(0)
    model, data = images(nn.ReLU()).double(), of_images(36)
    for replays in (False, True):
        objective = Objective(kind(function=squares))
        trainer = chunk_trainer(model, data, SGD(lr=0.1), replays=replays, objective=objective, pads=False)
        found.append(after_rounds(trainer, model, (12, 12, 12)))
    if level == "rounds" and kind is WeighedInPython:
        assert "not do the same" in trainer.rounds.refusal
        level = "passes"  # in which weights are given
    assert tapes(trainer, level).refusal == ""
    assert tapes(trainer, level).num_replayed > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rounds_of_another_shape_are_of_another_kind() -> None:
    torch.manual_seed(0)
    model, data = images(nn.ReLU()).double(), of_images(36)
    found = []
    for replays in (False, True):
        trainer = chunk_trainer(model, data, SGD(lr=0.1), replays=replays)
        found.append(after_rounds(trainer, model, (12, 12, 12), (12, 12, 11), (8, 8, 8), (8, 7, 8)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_takes_no_time_is_not_recorded(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    for module in ("passes", "chunk"):
        monkeypatch.setattr(f"fedmp.cohort.{module}._WORTH_S", 60.0)
    model = images(nn.ReLU()).double()
    trainer = chunk_trainer(model, of_images(36), SGD(lr=0.1), replays=True)
    after_rounds(trainer, model, (12, 12, 12))
    assert tapes(trainer, level).num_replayed == tapes(trainer, level).num_kinds_held == 0
    assert tapes(trainer, level).refusal == ""


def test_what_is_recorded_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that come just often enough to be recorded once, beside one that comes all the time."""
    monkeypatch.setattr("fedmp.cohort.replays._TAPES_BYTES", 1)
    monkeypatch.setattr("fedmp.cohort.chunk._SHORT", 0)
    model = images(nn.ReLU()).double()
    trainer = chunk_trainer(model, of_images(400), SGD(lr=0.1), replays=True)
    start = RoundStart(torch.cat([p.detach().flatten() for p in model.parameters()]), {})
    for round in range(60):
        size = 4 + round // 3  # a batch of another size for three rounds each
        for own, batch_size in ((8, 4), (size, size)):
            rows = Rows(torch.cat([torch.arange(own) + place for place in range(3)]), [own] * 3)
            counts = [-(-own // batch_size)] * 3
            batches = CohortBatches(
                ["a", "b", "c"], rows, np.arange(3), counts, batch_size=batch_size, seed=0, round=round
            ).chunk(0, 3)
            trainer.train(batches, torch.ones(3).double(), start, round=round + 1)
    assert tapes(trainer).num_replayed > 100  # of the 120 that are alike
    assert tapes(trainer).num_kinds_held <= 2
