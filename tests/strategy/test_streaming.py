"""Streaming DiLoCo's fragments and delays against a loop written from the paper, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from fedmp import Job
from fedmp.data.order import one_pass
from fedmp.graph import state_specs
from fedmp.records import Fault
from fedmp.strategy import StreamingDiLoCo
from tests.strategy.test_references import FLOAT64, Reference, Tensors, initial, job, mean
from tests.support.jobs import assert_same, run, topology, weights

ROUNDS = 5
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def streaming(strategy: StreamingDiLoCo, **changes: object) -> Job:
    settings = {"strategy": strategy, "optimizer": ADAMW, "rounds": ROUNDS, "topology": topology(2, 1)}
    return job(**{**settings, **changes})  # type: ignore[arg-type]


class Worker:
    """A client that never stops: one model and one AdamW for the whole run."""

    def __init__(self, reference: Reference, name: str) -> None:
        self.job, self.name, self.data = reference.job, name, reference.data[name]
        self.model = initial()
        self.optimizer = ADAMW(self.model.parameters())

    def batches(self, round: int) -> Iterator[torch.Tensor]:
        for epoch in range(100):
            order = one_pass(len(self.data), seed=self.job.seed, client=self.name, round=round, epoch=epoch)
            yield from order.split(self.job.batch_size)

    def step(self, indices: torch.Tensor) -> None:
        x, y = self.data.batch(indices)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def mix_in(self, fragment: Tensors, alpha: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name in fragment:
                parameter.copy_(alpha * parameter + (1 - alpha) * fragment[name])

    def values(self) -> Tensors:
        return weights(self.model)


def algorithm_2(made: Job) -> Tensors:
    """Inner steps without end; a fragment a round is sent, moved by the outer optimizer, mixed in tau steps later."""
    strategy, reference = made.strategy, Reference(made)
    assert isinstance(strategy, StreamingDiLoCo)
    fragments = strategy.scope(state_specs(initial())).fragments
    x = {name: torch.nn.Parameter(tensor) for name, tensor in reference.state.items()}
    outer = torch.optim.SGD(x.values(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [Worker(reference, name) for name in reference.data]
    incoming: Tensors = {}
    for round in range(1, ROUNDS + 1):
        sent = []
        for worker in workers:
            batches = worker.batches(round)
            start = worker.values()
            for step in range(strategy.local_steps or 0):
                if step == strategy.delay_steps:
                    worker.mix_in(incoming, strategy.mixing)
                    start = worker.values() if step == 0 else start
                worker.step(next(batches))
            sent.append(start if strategy.overlap else worker.values())
        average = mean(sent, [1 / len(sent)] * len(sent))
        fragment = fragments[(round - 1) % len(fragments)]
        outer.zero_grad()
        for name in fragment:
            x[name].grad = x[name].detach() - average[name]
        outer.step()
        incoming = {name: x[name].detach().clone() for name in fragment}
    return {name: parameter.detach() for name, parameter in x.items()}


CASES = [
    StreamingDiLoCo(local_steps=4, overlap=False),
    StreamingDiLoCo(local_steps=4),
    StreamingDiLoCo(local_steps=4, overlap=False, delay_steps=1),
    StreamingDiLoCo(local_steps=4, overlap=False, delay_steps=3, mixing=0.25, fragments=2, strided=False),
]


@pytest.mark.parametrize("strategy", CASES, ids=["none", "all steps", "1 step", "3 steps"])
def test_a_fragment_comes_in_after_its_delay_as_in_the_paper(
    tmp_path: Path, strategy: StreamingDiLoCo
) -> None:
    made = streaming(strategy)
    assert_same(weights(run(made, tmp_path)), algorithm_2(made), **FLOAT64)


def test_devices_take_fragments_in_at_the_same_step_as_simulated_clients(tmp_path: Path) -> None:
    made = streaming(StreamingDiLoCo(local_steps=3, overlap=False, delay_steps=2), topology=topology(2, 3))
    simulated, real = run(made, tmp_path / "simulate"), run(made, tmp_path / "local", "local")
    assert_same(weights(real), weights(simulated), **FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "push"])
def test_a_device_lost_while_others_have_gone_ahead_changes_nothing(tmp_path: Path, phase: str) -> None:
    made = streaming(
        StreamingDiLoCo(local_steps=3, overlap=False, delay_steps=2),
        topology=topology(2, 2),
        num_microbatches=2,
    )
    undisturbed = run(made, tmp_path / "undisturbed", "local")
    fault = Fault(device="c0/d1", round=2, phase=phase, kind="kill")
    disturbed = run(replace(made, faults=(fault,)), tmp_path / "disturbed", "local")
    assert disturbed.summary.faults == 1
    assert_same(weights(disturbed), weights(undisturbed))


def test_a_delayed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    made = streaming(StreamingDiLoCo(local_steps=3, overlap=False, delay_steps=2))
    whole = run(made, tmp_path / "whole")
    run(streaming(made.strategy, rounds=2), tmp_path / "part")
    assert_same(weights(run(made, tmp_path / "part", resume=True)), weights(whole))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delay_steps": 2}, "overlap=true is a delay of all 50 steps of a round; say overlap=false"),
        ({"delay_steps": 4, "local_steps": 4, "overlap": False}, "delay_steps=4 must be below local_steps=4"),
    ],
)
def test_a_delay_that_cannot_be_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StreamingDiLoCo(**fields)
