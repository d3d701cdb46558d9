"""A client's local work: which samples it processes, in which batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmp.client import LocalTrainer, LocalWork
from fedmp.data import Dataset
from fedmp.data.order import one_pass
from fedmp.errors import TrainingError
from fedmp.graph import trace
from fedmp.pipeline import BatchResult, StageRunner
from fedmp.schedule import OneFOneB
from fedmp.stages import Stage, draw_blueprints
from fedmp.tasks import CrossEntropy, MeanLoss, Task
from tests.support.jobs import sgd


def work(**changes: object) -> LocalWork:
    settings: dict[str, object] = {
        "optimizer": sgd(0.0),
        "schedule": OneFOneB(),
        "batch_size": 4,
        "num_microbatches": 2,
        "local_epochs": 1,
        "local_steps": None,
        "seed": 0,
        "evaluate_first": False,
    }
    return LocalWork(**{**settings, **changes})  # type: ignore[arg-type]


class Visits:
    """A task that writes down which samples it is asked about; the targets are sample numbers."""

    has_accuracy = False

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def weight(self, targets: torch.Tensor) -> float:
        return float(len(targets))

    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.seen.append(targets.tolist())
        return output.sum() * 0.0

    def num_correct(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        return 0.0


LINEAR = nn.Linear(2, 1)
BLUEPRINT = draw_blueprints(trace(LINEAR, (torch.zeros(3, 2),)), [], device=torch.device("cpu"))[0]


def trainer(task: Task, work: LocalWork, num_samples: int, client: str = "c0") -> LocalTrainer:
    stage = Stage(BLUEPRINT).materialize("cpu")
    stage.load_state(LINEAR.state_dict())
    dataset = Dataset(torch.zeros(num_samples, 2), torch.arange(num_samples))
    return LocalTrainer(
        StageRunner(stage, task), work, client=client, dataset=dataset, num_samples=num_samples
    )


def order(seed: int, client: str, round: int, epoch: int, num_samples: int) -> list[int]:
    return one_pass(num_samples, seed=seed, client=client, round=round, epoch=epoch).tolist()


@settings(max_examples=25, deadline=None)
@given(
    num_samples=st.integers(1, 23),
    batch_size=st.integers(1, 25),
    num_microbatches=st.integers(1, 6),
    local_epochs=st.integers(1, 3),
)
def test_an_epoch_visits_each_sample_exactly_once_whatever_the_batch_size(
    num_samples: int, batch_size: int, num_microbatches: int, local_epochs: int
) -> None:
    task = Visits()
    plan = work(batch_size=batch_size, num_microbatches=num_microbatches, local_epochs=local_epochs)
    trainer(task, plan, num_samples).train(round=1)
    visits = Counter(sample for part in task.seen for sample in part)
    assert visits == dict.fromkeys(range(num_samples), local_epochs)
    assert sum(visits.values()) == plan.num_examples(num_samples)


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(1, 23), batch_size=st.integers(1, 25), local_steps=st.integers(1, 30))
def test_local_steps_are_counted_and_so_are_their_samples(
    num_samples: int, batch_size: int, local_steps: int
) -> None:
    task = Visits()
    plan = work(batch_size=batch_size, local_steps=local_steps, num_microbatches=1)
    steps: list[int] = []
    trainer(task, plan, num_samples).train(round=1, on_step=lambda step, done, sums: steps.append(done))
    assert len(steps) == local_steps == plan.num_steps(num_samples)
    assert steps[-1] == sum(map(len, task.seen)) == plan.num_examples(num_samples)
    visits = Counter(sample for part in task.seen for sample in part)
    assert max(visits.values()) - min(visits.get(sample, 0) for sample in range(num_samples)) <= 1


def test_a_fraction_of_an_epoch_rounds_up_to_whole_batches() -> None:
    task = Visits()
    plan = work(batch_size=4, local_epochs=0.25, num_microbatches=1)
    trainer(task, plan, 23).train(round=1)
    assert [len(part) for part in task.seen] == [4, 4]  # a quarter of six batches
    assert plan.num_steps(23) == 2
    assert plan.num_examples(23) == 8
    assert plan.num_steps(3) == 1


def test_smoothed_labels_are_charged_as_torch_charges_them() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, -100, 2, 1, 1])
    task = CrossEntropy(label_smoothing=0.2)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(task.loss_sum(logits, labels) / task.weight(labels), expected)


def test_the_last_batch_is_as_short_as_it_must_be() -> None:
    task = Visits()
    trainer(task, work(batch_size=4, num_microbatches=1), 10).train(round=1)
    assert [len(part) for part in task.seen] == [4, 4, 2]


def test_the_batches_follow_seed_client_round_and_epoch() -> None:
    for seed, client, round in [(0, "c0", 1), (0, "c0", 2), (0, "c1", 1), (5, "c0", 1)]:
        task = Visits()
        trainer(task, work(seed=seed, local_epochs=2), 10, client).train(round=round)
        visited = [sample for part in task.seen for sample in part]
        assert visited == order(seed, client, round, 0, 10) + order(seed, client, round, 1, 10)
    assert order(0, "c0", 1, 0, 10) != order(0, "c1", 1, 0, 10)


def test_evaluation_visits_each_sample_once_in_order_and_changes_nothing() -> None:
    task = Visits()
    evaluator = trainer(task, work(batch_size=3), 29)
    result = evaluator.evaluate(round=1)
    assert [sample for part in task.seen for sample in part] == list(range(29))
    assert result.weight == 29
    state = evaluator._runner.stage.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in LINEAR.state_dict().items())


def test_the_sums_of_a_round_add_up_over_its_steps() -> None:
    sums: list[BatchResult] = []
    plan = work(local_epochs=2)
    total = trainer(MeanLoss(function=_squares), plan, 10).train(
        round=1, on_step=lambda step, done, so_far: sums.append(so_far)
    )
    assert sums[-1] == total.sums
    assert total.sums.weight == 20


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    nan = MeanLoss(function=lambda output, targets: output.sum() * float("nan"))
    stopped = trainer(nan, work(optimizer=sgd(0.1)), 10, client="bank")
    with pytest.raises(TrainingError, match=r"the loss is nan at client bank, stage 0, round 7, step 0"):
        stopped.train(round=7)
    state = stopped._runner.stage.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in LINEAR.state_dict().items())


def test_weights_that_are_not_finite_in_the_end_are_named() -> None:
    steep = MeanLoss(function=lambda output, targets: output.sum() * 1e25)
    with pytest.raises(
        TrainingError, match=r"bias is not finite any more at client c0, stage 0, after round 2"
    ):
        trainer(steep, work(optimizer=sgd(1e30), local_steps=1), 4).train(round=2)


def test_tokens_that_do_not_count_have_no_weight() -> None:
    task = CrossEntropy(ignore_index=0)
    assert task.weight(torch.tensor([[0, 1], [2, 0]])) == 2


def _squares(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] - targets).square().mean()
