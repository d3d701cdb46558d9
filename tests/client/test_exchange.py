"""A device goes on computing while its update is on the way, and takes back what it did if it guessed wrong."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr

from fedmp.client import DeviceSpec
from fedmp.client.device import serve_job
from fedmp.engine.client_plan import part_of
from fedmp.engine.prepare import prepare
from fedmp.records import Instruction
from fedmp.strategy import StreamingDiLoCo
from fedmp.tasks import CrossEntropy
from tests.support.jobs import tiny_job, topology, weights

STEPS, DELAY, ROUNDS = 4, 2, 3


class Counted(CrossEntropy):
    """Counts the steps that have been begun, one batch each."""

    _begun: int = PrivateAttr(0)
    _changed: threading.Condition = PrivateAttr(default_factory=threading.Condition)

    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
        return super().loss_sum(output, targets)

    @property
    def begun(self) -> int:
        return self._begun

    def wait_for(self, steps: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._begun >= steps, timeout=20.0)


class Coordinator:
    """Everything that a device asks for; an update gets no answer before the steps that it need not wait for."""

    def __init__(
        self, task: Counted, scope: Any, state: Mapping[str, torch.Tensor], *, forgets: int = 0
    ) -> None:
        self.task, self.scope, self.state, self.forgets = task, scope, state, forgets
        self.done, self.begun_at_push, self.pulls = 0, list[int](), list[tuple[int, bool, int]]()
        self.ahead = STEPS  # steps after which the next update is handed in

    def instruction(self, process: str = "") -> Instruction:
        if self.done == ROUNDS:
            return Instruction(kind="stop")
        state = f"{self.done:05d}" if self.done and self.done != self.forgets else ""
        return Instruction(kind="train", round=self.done + 1, state=state)

    def pull(self, round: int, *, whole: bool = False, **_: Any) -> dict[str, torch.Tensor]:
        self.pulls.append((round, whole, self.task.begun))
        return {name: self.state[name] for name in self.scope.pulled(self.state, round, whole=whole)}

    def push(self, round: int, payload: Mapping[str, torch.Tensor], report: object, **_: Any) -> None:
        assert payload.keys() == set(self.scope.pushed(self.state, round))
        if round < ROUNDS:
            # nothing comes in before it is answered, so the device cannot get further than this
            assert self.task.wait_for(self.ahead + DELAY), "the device waits for its update"
        self.begun_at_push.append(self.task.begun)
        self.done, self.ahead = round, self.ahead + STEPS + (DELAY if round == self.forgets else 0)

    def progress(self, report: object) -> None:
        pass

    def beat(self) -> None:
        pass

    def fail(self, report: object) -> None:
        raise AssertionError(report)


def train(folder: Path, *, forgets: int = 0) -> tuple[Coordinator, Counted]:
    task = Counted()
    strategy = StreamingDiLoCo(local_steps=STEPS, overlap=False, delay_steps=DELAY)
    job = tiny_job(strategy=strategy, topology=topology(1), num_microbatches=1, rounds=ROUNDS)
    prepared = prepare(job)
    setup = prepared.clients["c0"]
    spec = DeviceSpec(
        url="",
        token="",
        client="c0",
        device="d0",
        rank=0,
        placement=setup.plan.placement,
        blueprints=tuple(setup.blueprints),
        dataset=part_of(setup.own_samples, setup.blueprints),
        num_samples=len(setup.own_samples),
        task=task,
        work=setup.work,
        state_folder=folder,
        num_threads=0,
    )
    coordinator = Coordinator(task, prepared.scope, weights(prepared.model), forgets=forgets)
    serve_job(spec, coordinator)  # type: ignore[arg-type]
    return coordinator, task


def test_the_first_steps_of_a_round_are_made_while_the_last_ones_update_is_on_its_way(tmp_path: Path) -> None:
    coordinator, task = train(tmp_path)
    assert task.begun == ROUNDS * STEPS
    assert coordinator.begun_at_push == [STEPS + DELAY, 2 * STEPS + DELAY, 3 * STEPS]
    assert coordinator.pulls == [(1, True, 0), (2, False, STEPS + DELAY), (3, False, 2 * STEPS + DELAY)]


def test_steps_that_were_guessed_wrong_are_made_again_as_the_coordinator_says(tmp_path: Path) -> None:
    """The update of the first round did not count, so the second one begins from nothing."""
    coordinator, task = train(tmp_path, forgets=1)
    again = STEPS + DELAY  # steps before the second round was begun anew
    assert [(round, whole) for round, whole, _ in coordinator.pulls] == [(1, True), (2, True), (3, False)]
    assert coordinator.pulls[1][2] == again
    assert task.begun == ROUNDS * STEPS + DELAY
