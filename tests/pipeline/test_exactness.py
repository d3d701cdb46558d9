"""Exactness where it is easily lost: sizes, losses of several targets, outputs that change with the mode."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmp.graph import trace
from fedmp.pipeline import BatchResult, MicroBatches, RunnerOptions, microbatch_sizes
from fedmp.schedule import GPipe, Interleaved, OneFOneB, PlacedSchedule, Schedule, VShape, ZeroBubble
from fedmp.stages import Stage
from tests.pipeline.harness import assert_same_gradients, cut, make_runners, own_stages, train
from tests.pipeline.test_options import Noisy, noisy_batch
from tests.support.memory_transport import MemoryHub, MemoryTransport, run_ranks

AWKWARD = [
    (1, 1),
    (1, 16),
    (2, 3),
    (3, 16),
    (5, 2),
    (16, 16),
    (17, 16),
    (31, 7),
    (33, 4),
    (64, 5),
    (67, 16),
    (67, 1),
]
EVERY = [(size, count) for size in range(1, 68) for count in range(1, 17)]


class Plain(nn.Module):
    """Four layers with a skip over two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.third, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = torch.tanh(self.first(x))
        x = F.gelu(self.second(skip))
        return self.head(torch.tanh(self.third(x)) + skip)


def relative_error(stages: list[Stage], whole: nn.Module) -> float:
    """The 2-norm of the difference of all gradients over that of the gradient."""
    expected = {key: p.grad.double() for key, p in whole.named_parameters() if p.grad is not None}
    found = {
        key: p.grad.double() for stage in stages for key, p in stage.named_parameters() if p.grad is not None
    }
    assert found.keys() == expected.keys()
    difference = sum(float((found[key] - expected[key]).square().sum()) for key in expected)
    return float((difference / sum(float(g.square().sum()) for g in expected.values())) ** 0.5)


def check_sizes(sizes: list[tuple[int, int]], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Plain().to(dtype)
    graph = trace(model, (torch.zeros(4, 6, dtype=dtype),))
    stages = own_stages(model, graph, 2)
    runners = make_runners(stages)
    for size, num_microbatches in sizes:
        generator = torch.Generator().manual_seed(size)
        batch = (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for module in (model, *stages):
            module.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        train(runners, cut(batch, num_microbatches), OneFOneB())
        assert relative_error(stages, model) < tolerance, (size, num_microbatches)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_gradients_are_those_of_one_process_for_awkward_sizes(dtype: torch.dtype, tolerance: float) -> None:
    check_sizes(AWKWARD, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_gradients_are_those_of_one_process_for_every_size(dtype: torch.dtype, tolerance: float) -> None:
    check_sizes(EVERY, dtype, tolerance)


class Heads(nn.Module):
    """Classes and a value, as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.classes, self.value = nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x)
        return {"classes": self.classes(features), "value": self.value(features)[:, 0]}


class TwoTargets:
    """Cross entropy, and a squared error where there is a value; a sample with one counts twice."""

    has_accuracy = True

    def weight(self, targets: dict[str, torch.Tensor]) -> float:
        return float(len(targets["label"]) + targets["known"].sum())

    def loss_sum(self, output: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
        classes = F.cross_entropy(output["classes"], targets["label"], reduction="sum")
        return classes + ((output["value"] - targets["value"]).square() * targets["known"]).sum()

    def num_correct(self, output: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> float:
        return float((output["classes"].argmax(1) == targets["label"]).sum())


@pytest.mark.parametrize("schedule", [OneFOneB(), ZeroBubble(), VShape()], ids=lambda s: s.name)
def test_a_loss_may_need_several_targets_and_weigh_them(schedule: Schedule | PlacedSchedule) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    inputs = torch.randn(7, 6, dtype=torch.float64)
    targets = {
        "label": torch.randint(0, 5, (7,)),
        "value": torch.randn(7, dtype=torch.float64),
        "known": torch.tensor([1, 1, 0, 0, 0, 1, 0], dtype=torch.float64),
    }
    sizes = microbatch_sizes(7, 3)
    parts = zip(*(tensor.split(sizes) for tensor in targets.values()), strict=True)
    batch = MicroBatches(
        sizes,
        [(part,) for part in inputs.split(sizes)],
        [dict(zip(targets, part, strict=True)) for part in parts],
    )
    task = TwoTargets()
    (task.loss_sum(model(inputs), targets) / task.weight(targets)).backward()
    graph = trace(model, (inputs,))
    placement = schedule.placement(2) if isinstance(schedule, PlacedSchedule) else None
    stages = own_stages(model, graph, 4 if placement else 3)
    result = train(make_runners(stages, task=task, placement=placement), batch, schedule)
    assert_same_gradients(stages, model)
    assert result.weight == 7 + 3
    assert result.num_correct == task.num_correct(model(inputs), targets)


class Moody(nn.Module):
    """Auxiliary outputs and a None in training, one tensor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        early = torch.tanh(self.first(x))
        late = self.head(torch.tanh(self.second(early)))
        return {"late": late, "early": early[:, :5], "nothing": None} if self.training else late


class OfLate:
    """Uses the auxiliary output too, in training."""

    has_accuracy = False

    def weight(self, targets: torch.Tensor) -> float:
        return float(len(targets))

    def loss_sum(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
            return F.cross_entropy(output, targets, reduction="sum")
        assert output["nothing"] is None
        early = F.cross_entropy(output["early"], targets, reduction="sum")
        return F.cross_entropy(output["late"], targets, reduction="sum") + 0.3 * early

    def num_correct(self, output: Any, targets: torch.Tensor) -> float:
        return 0.0


@pytest.mark.parametrize("outputs_on", [None, 0, 1])
def test_training_and_evaluation_have_outputs_of_their_own(outputs_on: int | None) -> None:
    torch.manual_seed(0)
    model = Moody().double()
    inputs, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 5, (7,))
    task, batch = OfLate(), cut((inputs, targets), 3)
    (task.loss_sum(model(inputs), targets) / 7).backward()
    stages = own_stages(model, trace(model, (inputs,)), 2)
    runners = make_runners(stages, task=task)
    train(runners, batch, OneFOneB())
    assert_same_gradients(stages, model)

    kept: list[list[torch.Tensor]] = [[], []]
    results = run_ranks(
        lambda rank: runners[rank].evaluate_batch(
            batch, round=1, step=1, keep_outputs=kept[rank].append, outputs_on=outputs_on
        ),
        2,
    )
    wanted = 1 if outputs_on is None else outputs_on
    torch.testing.assert_close(torch.cat(kept[wanted]), model.eval()(inputs))
    assert kept[1 - wanted] == []
    expected = task.loss_sum(model(inputs), targets).item()
    assert results[1].loss_sum == pytest.approx(expected, rel=1e-12)
    train(runners, batch, OneFOneB(), step=2)  # in train mode again


class Several(nn.Module):
    """Tensors of several dtypes, a None and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.last(torch.tanh(self.first(x)))
        return {"scores": y, "best": y.argmax(1), "sure": y > 1, "none": None, "pair": (y.sum(1), 3)}


@pytest.mark.parametrize("schedule", [None, VShape()], ids=["one stage a device", "v-shape"])
def test_any_device_may_have_the_outputs_whatever_they_are(schedule: VShape | None) -> None:
    torch.manual_seed(0)
    model = Several()
    inputs = torch.randn(5, 6)
    graph = trace(model, (inputs,))
    placement = None if schedule is None else [(0, 2), (1,)]
    stages = own_stages(model, graph, 3)
    runners = make_runners(stages, placement=placement)
    batch = MicroBatches([3, 2], [(part,) for part in inputs.split([3, 2])])  # no targets: inference
    for target in range(len(runners)):
        kept: list[Any] = []
        results = run_ranks(
            lambda rank, target=target, kept=kept: runners[rank].evaluate_batch(
                batch, round=1, step=target, keep_outputs=kept.append, outputs_on=target
            ),
            len(runners),
        )
        assert results == [BatchResult()] * len(runners)
        for output, part in zip(kept, inputs.split([3, 2]), strict=True):
            expected = model.eval()(part)
            assert output.keys() == expected.keys()
            for name in ("scores", "best", "sure"):
                torch.testing.assert_close(output[name], expected[name])
            assert output["none"] is None
            torch.testing.assert_close(output["pair"][0], expected["pair"][0])
            assert output["pair"][1] == 3


def test_dropout_is_the_same_where_devices_have_several_stages() -> None:
    model, batch = Noisy().double(), noisy_batch(12)
    graph = trace(model, (batch[0],))
    found = []
    for schedule in (GPipe(), Interleaved(), VShape()):
        placement = schedule.placement(2) if isinstance(schedule, PlacedSchedule) else None
        stages = own_stages(model, graph, 4 if placement else 1)
        train(make_runners(stages, placement=placement, seed=3), cut(batch, 4), schedule)
        gradients = {key: p.grad for stage in stages for key, p in stage.named_parameters()}
        found.append(torch.cat([gradients[key].flatten() for key in sorted(gradients)]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("schedule", [OneFOneB(), Interleaved(), VShape()], ids=lambda s: s.name)
def test_under_autocast_boundaries_keep_their_dtype_and_gradients_come_back(
    schedule: Schedule | PlacedSchedule,
) -> None:
    torch.manual_seed(0)
    model = Plain()
    batch = (torch.randn(8, 6), torch.randint(0, 5, (8,)))
    graph = trace(model, (batch[0],))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]).float(), batch[1])
    loss.backward()
    placement = schedule.placement(2) if isinstance(schedule, PlacedSchedule) else None
    sent = []
    for options in (RunnerOptions(), RunnerOptions(autocast=torch.bfloat16)):
        stages = own_stages(model, graph, 4 if placement else 3)
        runners = make_runners(stages, placement=placement, options=options)
        train(runners, cut(batch, 4), schedule)
        sent.append([runner.bytes_sent for runner in runners])
    assert sent[0] == sent[1]
    assert all(
        p.grad.dtype == torch.float32 for stage in stages for p in stage.parameters() if p.grad is not None
    )
    assert relative_error(stages, model) < 0.05  # bfloat16 has 8 bits


def test_under_a_v_shape_neither_inputs_nor_targets_leave_the_first_device() -> None:
    """Every buffer that the device sends in training and evaluation is searched for pieces of them."""
    torch.manual_seed(0)
    model = Plain().double()
    inputs = torch.randn(8, 6, dtype=torch.float64)
    targets = torch.randint(0, 5, (8,))
    stages = own_stages(model, trace(model, (inputs,)), 4)
    runners = make_runners(stages, placement=VShape().placement(2), hub=(hub := _Recording()))
    full, empty = cut((inputs, targets), 3), cut((inputs, targets), 3)
    parts = [full, MicroBatches(empty.sizes)]  # the second device is given sizes alone

    def work(rank: int) -> None:
        runners[rank].train_batch(parts[rank], VShape(), round=1, step=0)
        runners[rank].evaluate_batch(parts[rank], round=1, step=1)

    run_ranks(work, 2)
    sent = b"".join(hub.sent[0])
    assert len(sent) > 8 * 16 * 8
    for row in inputs.numpy():
        for number in row:
            assert number.tobytes() not in sent
    for part in full.targets or ():
        assert np.ascontiguousarray(part.numpy()).tobytes() not in sent
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(inputs), targets).backward()
    assert_same_gradients(stages, whole)


class _Recording(MemoryHub):
    """A hub that keeps what each rank sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[int, list[bytes]] = {0: [], 1: []}

    def box(self, source: int, target: int, tag: int) -> Any:
        box = super().box(source, target, tag)
        return _RecordingBox(box, self.sent[source])


class _RecordingBox:
    def __init__(self, box: Any, sent: list[bytes]) -> None:
        self._box, self._sent = box, sent

    def put(self, buffer: torch.Tensor) -> None:
        self._sent.append(buffer.numpy().tobytes())
        self._box.put(buffer)

    def get(self, timeout: float) -> torch.Tensor:
        return self._box.get(timeout=timeout)  # type: ignore[no-any-return]


def test_the_recording_would_find_inputs_that_leave() -> None:
    hub = _Recording()
    MemoryTransport(hub, 0).send(torch.arange(8, dtype=torch.float64).view(torch.uint8), 1, 0)
    assert np.float64(3.0).tobytes() in b"".join(hub.sent[0])
